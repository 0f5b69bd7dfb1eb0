/** Asks before anything is done: it counts the runs, says how many, does it in slices, and reports. */
import { useEffect, useId, useRef, useState } from "react";
import type { FormEvent, ReactNode } from "react";
import { Problem, ask } from "./board";
import { count, plural } from "./format";
import { nameOf, wording } from "./operations";
import type { Lane, Operation, Preview } from "./operations";

/** What is asked: an operation, or which of those of a lane. */
export type Question = Operation | { kind: "lane"; lane: Lane; state: string; sentence: string | null };

interface Props {
  question: Question;
  onAsk: (question: Question) => void;
  onDone: (sentence: string) => void;
  onClose: () => void;
}

export function Dialog({ question, onAsk, onDone, onClose }: Props) {
  const dialog = useRef<HTMLDialogElement>(null);
  const title = useId();
  useEffect(() => dialog.current?.showModal(), []);
  return (
    <dialog ref={dialog} className="dialog" aria-labelledby={title} onClose={onClose}
      onClick={event => { if (event.target === dialog.current) dialog.current?.close(); }}>
      {question.kind === "lane"
        ? <Choose title={title} question={question} onAsk={onAsk} close={() => dialog.current?.close()} />
        : <Confirm key={JSON.stringify(question)} title={title} operation={question} onDone={onDone} close={() => dialog.current?.close()} />}
    </dialog>
  );
}

function Choose({ title, question: { lane, state, sentence }, onAsk, close }: {
  title: string; question: Extract<Question, { kind: "lane" }>; onAsk: (question: Question) => void; close: () => void;
}) {
  const here = { provider: lane.provider, ...(lane.model ? { model: lane.model } : {}) };
  const known = lane.provider !== "?";
  const closed = state === "paused" || state === "blocked";
  return (
    <div className="dialog-body">
      <h2 id={title}>{nameOf(lane)}</h2>
      <p>{sentence ?? (state === "open" ? "It is open." : `Its state: ${state}.`)}</p>
      <div className="choices">
        {known && closed && <Choice onClick={() => onAsk({ kind: "open", ...here })} name="Open" note="What waits may start at once" />}
        {known && state !== "paused" && <Choice onClick={() => onAsk({ kind: "pause", ...here })} name="Pause" note="Nothing new is started; what runs goes on" />}
        {known && <Choice onClick={() => onAsk({ kind: "limit", ...here, per_minute: null, max_running: null })} name="Change the limit" note="Starts a minute, and how many at a time" />}
        <Choice onClick={() => onAsk({ kind: "cancel", state: "pending", ...here })} name="Cancel what waits" note="All that is in line" final />
        <Choice onClick={() => onAsk({ kind: "cancel", state: "running", ...here })} name="Cancel what runs" note="Also at the provider; it may be charged" final />
      </div>
      <div className="dialog-foot"><button className="button" onClick={close}>Close</button></div>
    </div>
  );
}

function Choice({ name, note, onClick, final = false }: { name: string; note: string; onClick: () => void; final?: boolean }) {
  return <button className="choice" data-final={final} onClick={onClick}><b>{name}</b><span>{note}</span></button>;
}

function Confirm({ title, operation, onDone, close }: {
  title: string; operation: Operation; onDone: (sentence: string) => void; close: () => void;
}) {
  const [found, setFound] = useState<Preview>();
  const [problem, setProblem] = useState<Problem>();
  const [changed, setChanged] = useState<number>();
  const stopped = useRef(false);
  const heading = useRef<HTMLHeadingElement>(null);

  useEffect(() => {
    const counting = new AbortController();
    heading.current?.focus();
    ask<Preview>("preview", { operation }, counting.signal).then(setFound, (error: unknown) => {
      if (error instanceof Problem) setProblem(error);
    });
    return () => { counting.abort(); stopped.current = true; };
  }, [operation]);
  // Strict mode runs effects twice.
  useEffect(() => { stopped.current = false; }, []);

  const words = wording(operation, found?.runs ?? 0);
  const busy = changed !== undefined && !problem;

  async function carryOut(event: FormEvent<HTMLFormElement>) {
    event.preventDefault();
    if (!found || busy) return;
    const form = new FormData(event.currentTarget);
    const limit = (name: string) => (form.get(name) ? Number(form.get(name)) : null);
    const chosen = operation.kind === "limit"
      ? { ...operation, per_minute: limit("per_minute"), max_running: limit("max_running") }
      : operation;
    setProblem(undefined);
    let total = 0;
    setChanged(total);
    try {
      for (;;) {
        const { done, left } = await ask<{ done: number; left: number }>("act", { operation: chosen, bounds: found.bounds });
        total += done;
        setChanged(total);
        // A slice that changed nothing will not the next time either.
        if (left === 0 || done === 0 || stopped.current) {
          const missing = words.runs ? found.runs - total - left : 0;
          onDone([
            words.done(total), left > 0 && `${plural(left, "is", "are")} left.`, missing > 0 && `${count(missing)} had moved on by then.`,
          ].filter(Boolean).join(" "));
          return close();
        }
      }
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      setProblem(total > 0 ? new Problem(`${words.done(total)} Then: ${error.message}`, error.hint) : error);
    }
  }

  const nothing = found !== undefined && words.runs && found.runs === 0;
  return (
    <form className="dialog-body" onSubmit={event => void carryOut(event)}>
      <h2 id={title} ref={heading} tabIndex={-1}>{words.title}</h2>
      <p role="status">
        {found ? nothing ? "There is no such run." : words.sentence : problem ? "" : "Counting …"}
      </p>
      {operation.kind === "limit" && found && (
        <div className="limits">
          <Field name="per_minute" label="Starts a minute" value={found.per_minute} />
          <Field name="max_running" label="At a time" value={found.max_running} />
          <p>Empty: no limit of {operation.model ? "the model's own" : "its own"}.</p>
        </div>
      )}
      {busy && found && words.runs && (
        <p className="progress">
          <progress max={Math.max(found.runs, 1)} value={changed} aria-label="Done" />
          <span>{count(changed)} of {count(found.runs)}</span>
        </p>
      )}
      {problem && <p className="complaint" role="alert"><b>{problem.message}</b> {problem.hint}</p>}
      <div className="dialog-foot">
        <button className="button" type="button" onClick={() => { if (busy) stopped.current = true; else close(); }}>
          {busy ? "Stop" : nothing ? "Close" : "Leave it"}
        </button>
        {!nothing && (found || !problem) && (
          <button className="button" data-strong="true" data-final={words.final} disabled={!found || busy}>
            {found ? words.button : "…"}
          </button>
        )}
      </div>
    </form>
  );
}

function Field({ name, label, value }: { name: string; label: string; value: number | null }): ReactNode {
  return (
    <label>
      <span>{label}</span>
      <input name={name} type="number" min={0} max={2147483647} step={1} inputMode="numeric" defaultValue={value ?? ""} placeholder="any" />
    </label>
  );
}
