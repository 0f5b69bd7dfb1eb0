# The daemon: no port, no volume, one process. Needs DATABASE_URL, SUPABASE_URL, SUPABASE_SERVICE_ROLE_KEY and a
# provider's key; `docker run IMAGE migrate` prepares the database.
FROM python:3.13-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/image-jobs
# The dependencies first: they change less often than the code.
COPY pyproject.toml ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
      > requirements.txt \
    && /opt/image-jobs/bin/pip install --no-cache-dir --requirement requirements.txt
COPY README.md ./
COPY daemon ./daemon
COPY sql ./sql
RUN IMAGE_JOBS_SKIP_CANVAS=1 /opt/image-jobs/bin/pip install --no-cache-dir '.[metrics]'

FROM python:3.13-slim-bookworm
COPY --from=build /opt/image-jobs /opt/image-jobs
ENV PATH=/opt/image-jobs/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    IMAGE_JOBS_LOG_FORMAT=json
RUN useradd --system --uid 10001 --no-create-home image-jobs
USER 10001
WORKDIR /tmp
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s --retries=3 CMD ["image-jobs", "check"]
# Without a shell in between: SIGTERM has to reach Python, which then drains. Give it time: `docker run --stop-timeout 300`.
ENTRYPOINT ["image-jobs"]
CMD ["run"]
