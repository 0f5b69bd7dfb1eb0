/** Sharing: a link that makes its opener a member, leaving, and the page of who is no member. */
import { useEffect, useState } from "react";
import type { SupabaseClient } from "@supabase/supabase-js";
import { Icon } from "./Icon";
import { keepDraft, readDraft } from "./drafts";

const ADDRESS = /^#([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})?(?:\?join=([\w-]+))?$/i;

/** Reads `#<workflow>?join=<token>`. Behind the # no server sees it, and none can log it. */
export function parseAddress(hash: string): { workflowId: string | undefined; token: string | undefined } {
  const [, workflowId, token] = ADDRESS.exec(hash) ?? [];
  return { workflowId: workflowId?.toLowerCase(), token };
}

export function addressOf(workflowId: string, token: string): string {
  return `${location.origin}${location.pathname}#${workflowId}?join=${token}`;
}

/** What a function of the database says when it refuses; without a code the server was not reached. */
export function sentenceOf({ code, message, hint }: { code: string; message: string; hint: string | null }): string {
  return code ? [message, hint].filter(Boolean).join(" ") : "The server cannot be reached. Try again when the connection is back.";
}

/**
 * Whether the user may use a workflow; undefined until that is known.
 *
 * It is asked only while there is nothing to see: nobody sees a row of a foreign workflow, so it looks like a new one.
 * `nodes`: how many are seen; undefined while they are loaded.
 */
export function useAccess(supabase: SupabaseClient, workflowId: string, nodes: number | undefined): boolean | undefined {
  const [access, setAccess] = useState<boolean>();
  const isEmpty = nodes === 0;
  useEffect(() => {
    if (!isEmpty) return;
    let isCurrent = true;
    void supabase.rpc("can_open_workflow", { workflow_id: workflowId }).then(({ data, error }) => {
      if (isCurrent) setAccess(error !== null || data === true); // where it cannot be asked, the first insert will tell
    });
    return () => { isCurrent = false; };
  }, [supabase, workflowId, isEmpty]);
  return nodes === undefined ? undefined : isEmpty ? access : true;
}

/** The button of the header, and what it opens. */
export function Share({ supabase, workflowId }: { supabase: SupabaseClient; workflowId: string }) {
  const [link, setLink] = useState<string>();
  const [said, setSaid] = useState("");

  /** Returns the result of a function; undefined where it has refused, which is then said. */
  const call = async (name: string): Promise<unknown> => {
    const { data, error } = await supabase.rpc(name, { workflow_id: workflowId });
    setSaid(error ? sentenceOf(error) : "");
    return error ? undefined : data ?? true;
  };
  const copy = async () => {
    const token = link ? undefined : await call("share_workflow");
    const address = link ?? (typeof token === "string" ? addressOf(workflowId, token) : undefined);
    if (!address) return;
    setLink(address);
    try {
      await navigator.clipboard.writeText(address);
      setSaid("The link is copied.");
    } catch {
      setSaid("Copy the link from here."); // the browser keeps the clipboard closed
    }
  };
  const revoke = async () => {
    if (!await call("unshare_workflow")) return;
    setLink(undefined);
    setSaid("No link opens this canvas any more. Members stay members.");
  };
  const leave = async () => {
    if (confirm("Leave this canvas? You need a new link to come back.") && await call("leave_workflow")) location.reload();
  };
  return (
    <>
      <button className="button" popoverTarget="sharing" aria-label="Share" title="Share this canvas">
        <Icon path="M8 9.6V2.4M5.2 5 8 2.2 10.8 5M4 7.6H3.2v6h9.6v-6H12" /><span>Share</span>
      </button>
      <section className="sharing nokey" id="sharing" popover="auto" aria-label="Share this canvas">
        <p>
          Everybody who opens the link within 7 days becomes a member. Members see all that is here; each may change it, generate,
          and share it on.
        </p>
        {link && <input readOnly value={link} aria-label="Link" onFocus={event => event.target.select()} />}
        <div>
          <button className="button" data-strong="true" onClick={() => void copy()}>Copy link</button>
          <button className="button" onClick={() => void revoke()}>Revoke all links</button>
          <button className="button" onClick={() => void leave()}>Leave</button>
        </div>
        <p role="status">{said}</p>
      </section>
    </>
  );
}

/** Shown in place of an empty canvas to who is no member. `reason`: why a link did not help. */
export function NoAccess({ workflowId, reason }: { workflowId: string; reason?: string | undefined }) {
  const draft = readDraft();
  const text = draft?.workflowId === workflowId ? draft.text : undefined;
  const openNew = () => {
    const id = crypto.randomUUID();
    if (text) keepDraft(id, text);
    location.hash = id;
  };
  return (
    <section className="first" data-denied="true">
      <h1>You have no access to this canvas.</h1>
      <p>{reason ?? "Only its members see it. Ask one of them for a link: Share, at the top of the canvas, makes it."}</p>
      {text && (
        <figure className="draft">
          <figcaption>What you have typed is not lost. A new canvas takes it along.</figcaption>
          <blockquote dir="auto">{text}</blockquote>
        </figure>
      )}
      <p>
        <button className="button" data-strong="true" onClick={openNew}>New canvas</button>
        <button className="button" onClick={() => location.reload()}>Try again</button>
      </p>
    </section>
  );
}
