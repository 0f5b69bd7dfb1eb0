/** The tables: providers and models, failures, daemons, and what else may go wrong. */
import type { Question } from "./Dialog";
import { ACTIONS, Table } from "./Table";
import type { Row } from "./Table";
import type { Board, Model, Period, Provider, State } from "./board";
import { ago, count, dollars, duration, percent, plural, seconds, time } from "./format";
import { nameOf } from "./operations";

interface Props {
  board: Board;
  onAsk: (question: Question) => void;
}

const LANE_COLUMNS = ["Provider", "State", "In line", "Under way", "Limit", "Done", "Failed", "p50", "p95", "Spent", ACTIONS] as const;

export function Lanes({ board, onAsk }: Props) {
  const rows: Row[] = providers(board).flatMap(provider => [
    laneRow(provider, provider.pending, onAsk),
    ...board.models.filter(model => model.provider === provider.provider).map(model => laneRow(model, model.waiting, onAsk, provider)),
  ]);
  return (
    <section className="card" aria-labelledby="lanes">
      <h2 id="lanes">Providers and models</h2>
      {rows.length === 0
        ? <p className="empty">No runs yet, and no daemon that serves a provider.</p>
        : <Table name="Providers and models" className="lanes" columns={LANE_COLUMNS} numbers={[2, 3, 4, 5, 6, 7, 8, 9]} rows={rows} />}
    </section>
  );
}

/** Those with runs or a closing; and those that daemons serve, of which there is nothing else to say. */
function providers(board: Board): Provider[] {
  const known = new Set(board.queue.map(each => each.provider));
  const idle = new Set(board.daemons.filter(each => each.state === "alive").flatMap(each => each.providers).filter(name => !known.has(name)));
  return [...board.queue, ...[...idle].map(provider => ({
    provider, pending: 0, delayed: 0, running: 0, parked: 0, completed: 0, failed: 0, cancelled: 0, oldest_wait: null, usd: 0,
    per_minute: null, max_running: null, state: "open" as const, until: null, sentence: null,
  }))].sort((one, other) => one.provider.localeCompare(other.provider));
}

/** What to do about a provider or a model. */
export const questionOf = (lane: Provider | Model): Question => ({
  kind: "lane", lane: { provider: lane.provider, model: "model" in lane ? lane.model : undefined }, state: lane.state, sentence: lane.sentence,
});

function laneRow(lane: Provider | Model, waiting: number, onAsk: (question: Question) => void, provider?: Provider): Row {
  const model = "model" in lane ? lane : undefined;
  const ended = lane.completed + lane.failed;
  const limit = [
    lane.per_minute !== null && `${count(lane.per_minute)} a minute`,
    lane.max_running !== null && `${count(lane.max_running)} at a time`,
  ].filter(Boolean).join(", ");
  const name = nameOf({ provider: lane.provider, model: model?.model });
  const manageable = model?.model !== "…";
  return {
    key: name,
    level: model ? "part" : "group",
    cells: [
      model ? model.model : nameOf(lane),
      <Badge key="state" lane={lane} sentence={lane.sentence === provider?.sentence ? null : lane.sentence} />,
      waiting + lane.delayed > 0
        ? <span key="waiting">{count(waiting)}{lane.delayed > 0 && <small> + {count(lane.delayed)} later</small>}{lane.oldest_wait !== null && waiting > 0 && <small> · {duration(lane.oldest_wait)}</small>}</span>
        : "",
      lane.running + lane.parked > 0 ? count(lane.running + lane.parked) : "",
      limit,
      lane.completed > 0 ? count(lane.completed) : "",
      lane.failed > 0 ? <span key="failed" className="bad">{count(lane.failed)}<small> · {percent(lane.failed / ended)}</small></span> : "",
      model && model.generate_p50_ms !== null ? seconds(model.generate_p50_ms) : "",
      model && model.generate_p95_ms !== null ? seconds(model.generate_p95_ms) : "",
      lane.usd > 0 ? dollars(lane.usd) : "",
      manageable
        ? <button key="manage" className="button" data-small="true" aria-label={`Manage ${name}`}
            onClick={() => onAsk(questionOf(lane))}>Manage</button>
        : "",
    ],
  };
}

const STATES: Readonly<Record<State, string>> = {
  open: "Open", paused: "Paused", limited: "At its limit", blocked: "Blocked", unserved: "No daemon", budget: "Budget spent", storage: "Storage",
};

/** Of a model the sentence is left out where its provider's row has the same. */
function Badge({ lane, sentence }: { lane: Provider | Model; sentence: string | null }) {
  const until = lane.until && lane.state !== "open" ? ` until ${time(lane.until)}` : "";
  return (
    <span className="state" data-state={lane.state}>
      <span className="badge"><i />{STATES[lane.state]}{until}</span>
      {sentence && <small>{sentence}</small>}
    </span>
  );
}

export function Codes({ board, period, onAsk }: Props & { period: Period }) {
  const most = Math.max(1, ...board.failures_by_code.map(each => each.count));
  return (
    <section className="card" aria-labelledby="codes">
      <h2 id="codes">Failures by code</h2>
      {board.failures_by_code.length === 0
        ? <p className="empty">Nothing has failed in this period.</p>
        : <Table name="Failures by code" className="codes" columns={["Code", "Runs", "Last", "For example", ACTIONS]} numbers={[1]}
            rows={board.failures_by_code.map(each => ({
              key: each.code ?? "",
              cells: [
                <span key="code" className="code">{each.code ?? "no code"}<small>{each.providers.join(", ")}</small></span>,
                <span key="count" className="share"><i style={{ width: `${(each.count / most) * 100}%` }} aria-hidden="true" />{count(each.count)}</span>,
                ago(each.last, board.at),
                <Sentence key="example" error={each.error} hint={each.hint} run={each.example} />,
                <span key="actions" className="actions">
                  <button className="button" data-small="true" onClick={() => onAsk({ kind: "requeue", code: each.code, period })} aria-label={`Requeue these: ${each.code ?? "no code"}`}>Requeue these</button>
                  {each.code !== null && <button className="button" data-small="true" data-quiet="true" onClick={() => onAsk({ kind: "cancel", state: "pending", code: each.code! })} aria-label={`Cancel retries after ${each.code}`}>Cancel retries</button>}
                </span>,
              ],
            }))} />}
    </section>
  );
}

function Sentence({ error, hint, run }: { error: string | null; hint: string | null; run?: string }) {
  return <span className="sentence"><span dir="auto">{error ?? "It says nothing."}</span>{hint && <small dir="auto">{hint}</small>}{run && <code>{run}</code>}</span>;
}

export function Failures({ board, onAsk }: Props) {
  return (
    <section className="card" aria-labelledby="failures">
      <h2 id="failures">Latest failures</h2>
      {board.failures.length === 0
        ? <p className="empty">Nothing has failed in the last day.</p>
        : <Table name="Latest failures" className="failures" columns={["When", "What", "Why", "Run", ACTIONS]}
            rows={board.failures.map(each => ({
              key: each.id,
              cells: [
                <time key="when" dateTime={each.finished_at}>{ago(each.finished_at, board.at)}</time>,
                <span key="what" className="code">{each.processor}<small>{each.code ?? "no code"}, {each.attempt === 1 ? "first attempt" : `attempt ${each.attempt}`}</small></span>,
                <Sentence key="why" error={each.error} hint={each.hint} />,
                <code key="run">{each.id}</code>,
                <button key="requeue" className="button" data-small="true" onClick={() => onAsk({ kind: "requeue_run", run: each.id })} aria-label={`Requeue ${each.id}`}>Requeue</button>,
              ],
            }))} />}
    </section>
  );
}

export function Daemons({ board }: { board: Board }) {
  return (
    <section className="card" aria-labelledby="daemons">
      <h2 id="daemons">Daemons</h2>
      {board.daemons.length === 0
        ? <p className="empty">No daemon is running. Start one with <code>image-jobs run</code>.</p>
        : <Table name="Daemons" className="daemons" columns={["Name", "State", "Slots", "Beat", "Up for", "Providers"]} numbers={[2, 3, 4]}
            rows={board.daemons.map(each => ({
              key: each.id,
              cells: [
                <span key="name" className="code">{each.name}<small>{each.version}</small></span>,
                <span key="state" className="badge" data-state={each.state}><i />{{ alive: "Alive", draining: "Draining", silent: "Silent" }[each.state]}</span>,
                `${count(each.in_flight)} of ${count(each.slots)}`,
                `${duration(each.last_beat)} ago`,
                duration((Date.parse(board.at) - Date.parse(each.started_at)) / 1000),
                each.providers.join(", "),
              ],
            }))} />}
    </section>
  );
}

export function Plumbing({ board: { storage, base64_refused, webhooks, cancellations } }: { board: Board }) {
  const rows: [string, string, boolean][] = [
    ["Storage", `${count(storage.stored)} stored${storage.failed > 0 ? `, ${count(storage.failed)} failed` : ""}${storage.success_rate !== null ? ` (${percent(storage.success_rate)})` : ""}`, storage.failed > 0],
    ["Base64", base64_refused === 0 ? "none came near the database" : `${count(base64_refused)} kept out of the database`, base64_refused > 0],
    ["Cancellations", cancellations.waiting === 0 ? "none waits at a provider" : `${count(cancellations.waiting)} wait at a provider${cancellations.oldest_wait !== null ? `, the oldest for ${duration(cancellations.oldest_wait)}` : ""}${cancellations.tried > 0 ? `, ${count(cancellations.tried)} tried before` : ""}`, cancellations.tried > 0],
    ...(webhooks.length === 0
      ? [["Webhooks", "none came, none was missed", false] as [string, string, boolean]]
      : webhooks.map((each): [string, string, boolean] => [
        `Webhooks of ${each.provider}`,
        [plural(each.accepted, "accepted", "accepted"), each.duplicates > 0 && `${count(each.duplicates)} twice`, each.refused > 0 && `${count(each.refused)} refused`, each.late > 0 && `${count(each.late)} late`].filter(Boolean).join(", "),
        each.refused + each.late > 0,
      ])),
  ];
  return (
    <section className="card" aria-labelledby="plumbing">
      <h2 id="plumbing">Storage and webhooks</h2>
      <dl className="plumbing">
        {rows.map(([name, value, bad]) => <div key={name} data-bad={bad}><dt>{name}</dt><dd>{value}</dd></div>)}
      </dl>
    </section>
  );
}
