"""The registry finds providers by reading the folder, without importing them."""

from pathlib import Path

from daemon.providers import PROVIDERS, find_providers


def test_registry_lists_modules_that_have_a_setting() -> None:
    assert list(PROVIDERS) == ["demo", "google", "midjourney", "openai", "stability"]
    assert PROVIDERS["google"] == "daemon.providers.google"


def test_registry_imports_nothing_and_ignores_helpers(tmp_path: Path) -> None:
    (tmp_path / "lazy.py").write_text('import an_sdk_that_is_not_installed\n\nSETTING: str = "LAZY_API_KEY"\n')
    (tmp_path / "helper.py").write_text('def f():\n    SETTING = "indented"\n')
    (tmp_path / "notes.txt").write_text('SETTING = "NO_MODULE"\n')
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text('SETTING = "PACKAGE_API_KEY"\n')
    (package / "models.py").write_text("MODELS = ()\n")
    (tmp_path / "__pycache__").mkdir()

    assert find_providers(tmp_path) == {"lazy": "daemon.providers.lazy", "package": "daemon.providers.package"}
