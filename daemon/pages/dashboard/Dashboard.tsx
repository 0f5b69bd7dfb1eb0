/** All on one page, the most urgent first. Whatever users and providers have written is text. */
import { useEffect, useRef, useState } from "react";
import { Chart } from "./Chart";
import type { Line } from "./Chart";
import { Dialog } from "./Dialog";
import type { Question } from "./Dialog";
import { Header, useTheme } from "./Header";
import { Codes, Daemons, Failures, Lanes, Plumbing, questionOf } from "./Sections";
import { PERIODS, useBoard } from "./board";
import type { Board, Period, Problem, Step } from "./board";
import { ago, clock, count, dollars, duration, percent, plural, seconds } from "./format";
import { nameOf } from "./operations";

const THROUGHPUT: readonly Line[] = [
  { name: "done", colour: "--good", value: step => step.completed },
  { name: "failed", colour: "--bad", value: step => step.failed },
];
const LATENCY: readonly Line[] = [
  { name: "p50", colour: "--accent", value: step => step.generate_p50_ms },
  { name: "p95", colour: "--wait", value: step => step.generate_p95_ms },
];
const MONEY: readonly Line[] = [{ name: "spent", colour: "--accent", value: step => step.usd }];

export function Dashboard() {
  const [period, setPeriod] = useState<Period>("1h");
  const [theme, onTheme] = useTheme();
  const { board, problem, shown, refresh } = useBoard(period);
  const [question, setQuestion] = useState<Question>();
  const [report, setReport] = useState("");
  const main = useRef<HTMLElement>(null);
  useEffect(() => {
    if (!report) return;
    const timer = setTimeout(() => setReport(""), 12_000);
    return () => clearTimeout(timer);
  }, [report]);

  return (
    <>
      <Header board={board} problem={problem} period={period} onPeriod={setPeriod} theme={theme} onTheme={onTheme} />
      <main ref={main} tabIndex={-1} aria-busy={!board && !problem}>
        {problem && <Outage problem={problem} board={board} />}
        {board && (
          <div className="board" data-old={problem !== undefined || shown !== period}>
            <Alerts board={board} onAsk={setQuestion} />
            <Figures board={board} period={PERIODS[shown]} />
            <Charts board={board} period={PERIODS[shown]} theme={theme} />
            <Lanes board={board} onAsk={setQuestion} />
            <Codes board={board} period={shown} onAsk={setQuestion} />
            <Failures board={board} onAsk={setQuestion} />
            <div className="pair">
              <Daemons board={board} />
              <Plumbing board={board} />
            </div>
          </div>
        )}
      </main>
      {question && (
        <Dialog question={question} onAsk={setQuestion}
          onDone={sentence => { setReport(sentence); refresh(); }}
          onClose={() => {
            setQuestion(undefined);
            // What opened it may have left the page meanwhile.
            requestAnimationFrame(() => { if (document.activeElement === document.body) main.current?.focus(); });
          }} />
      )}
      <div className="report" role="status" data-empty={report === ""}>{report}</div>
    </>
  );
}

function Outage({ problem, board }: { problem: Problem; board: Board | undefined }) {
  return (
    <section className="outage" role="alert">
      <p><b>{problem.message}</b> {problem.hint}</p>
      {board && <p>What stands below is of {clock(board.at)}.</p>}
    </section>
  );
}

function Alerts({ board: { alerts, at: now, totals, queue, models }, onAsk }: { board: Board; onAsk: (question: Question) => void }) {
  const lanes = new Map([...queue, ...models].map(lane => [nameOf(lane), lane]));
  const manage = (subject: string) => {
    const lane = lanes.get(subject);
    return lane && <button className="button" data-small="true" aria-label={`See to it: ${subject}`} onClick={() => onAsk(questionOf(lane))}>See to it</button>;
  };
  return (
    <section aria-label="Alerts">
      {alerts.length === 0
        ? totals.daemons > 0
          ? <p className="calm"><i />All is well: nothing to see to.</p>
          : <p className="calm" data-asleep="true"><i />Nothing is wrong, and no daemon is running yet: start one with image-jobs run.</p>
        : (
          <ul className="alerts">
            {alerts.map(alert => (
              <li key={`${alert.name} ${alert.subject}`} data-severity={alert.severity}>
                <p><span className="severity">{alert.severity === "critical" ? "Critical" : "Warning"}</span><b>{alert.sentence}</b></p>
                <p>{alert.cure}</p>
                <time dateTime={alert.since}>{ago(alert.since, now)}</time>
                {manage(alert.subject)}
              </li>
            ))}
          </ul>
        )}
    </section>
  );
}

function Figures({ board: { totals }, period }: { board: Board; period: string }) {
  const ended = totals.completed + totals.failed;
  return (
    <section aria-label="Now">
      <dl className="figures">
        <Figure name="In line" value={count(totals.waiting)}
          note={[totals.oldest_wait !== null && totals.waiting > 0 ? `oldest ${duration(totals.oldest_wait)}` : "nothing waits", totals.delayed > 0 && `${count(totals.delayed)} later`]} />
        <Figure name="In the making" value={count(totals.running + totals.parked)}
          note={[`${count(totals.running)} of ${plural(totals.slots, "slot")}`, totals.parked > 0 && `${count(totals.parked)} at a provider`]}
          share={totals.slots > 0 ? totals.running / totals.slots : 0} />
        <Figure name="Done" value={count(totals.completed)} note={[`in ${period}`, totals.cancelled > 0 && `${count(totals.cancelled)} cancelled`]} />
        <Figure name="Failed" value={count(totals.failed)} bad={totals.failed > 0}
          note={[ended > 0 ? `${percent(totals.failed / ended)} in ${period}` : `in ${period}`]} />
        <Figure name="Spent" value={dollars(totals.usd)} note={[`in ${period}`, totals.possible_usd > 0 && `perhaps ${dollars(totals.possible_usd)} more`]} />
        <Figure name="Today" value={dollars(totals.usd_today)} note={["since 0:00 UTC", totals.possible_usd_today > 0 && `perhaps ${dollars(totals.possible_usd_today)} more`]} />
      </dl>
    </section>
  );
}

function Figure({ name, value, note, share, bad = false }: {
  name: string; value: string; note: readonly (string | false)[]; share?: number; bad?: boolean;
}) {
  return (
    <div className="card figure" data-bad={bad}>
      <dt>{name}</dt>
      <dd><b>{value}</b><span>{note.filter(Boolean).join(" · ")}</span></dd>
      {share !== undefined && <dd className="meter" aria-hidden="true"><i style={{ width: `${Math.min(1, share) * 100}%` }} /></dd>}
    </div>
  );
}

function Charts({ board, period, theme }: { board: Board; period: string; theme: string }) {
  const steps = board.series;
  const sum = (value: (step: Step) => number) => steps.reduce((total, step) => total + value(step), 0);
  const busiest = steps.reduce((most, step) => Math.max(most, step.completed + step.failed), 0);
  const slowest = steps.reduce((most, step) => Math.max(most, step.generate_p95_ms ?? 0), 0);
  const width = duration(board.step);
  return (
    <section className="charts" aria-label={`The last ${period}`}>
      <Chart title="Throughput" steps={steps} lines={THROUGHPUT} bars format={whole} theme={theme} width={board.step}
        sentence={`${plural(sum(step => step.completed), "run")} done and ${count(sum(step => step.failed))} failed in ${period}; at most ${count(busiest)} in ${width}.`} />
      <Chart title="Time to generate" steps={steps} lines={LATENCY} format={seconds} theme={theme} width={board.step}
        sentence={slowest > 0 ? `The slowest ${width} has a p95 of ${seconds(slowest)}.` : "Nothing was made."} />
      <Chart title="Money" steps={steps} lines={MONEY} bars format={dollars} theme={theme} width={board.step}
        sentence={`${dollars(sum(step => step.usd))} in ${period}.`} />
    </section>
  );
}

/** Ticks of the axis may stand between whole runs. */
const whole = (value: number) => (Number.isInteger(value) ? count(value) : "");
