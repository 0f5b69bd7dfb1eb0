/** The user's canvases: their list, the name of this one, a new one, and a link to share each. */
import { useCallback, useEffect, useRef, useState } from "react";
import type { SupabaseClient } from "@supabase/supabase-js";
import { Icon } from "./Icon";
import { addressOf, sentenceOf } from "./Sharing";

const UNTITLED = "Untitled canvas";
const MAX_TITLE = 120;
/** Canvases that are listed, and nodes that are looked at for want of a name. */
const MAX_CANVASES = 200, MAX_PROMPTS = 500;

interface Entry {
  id: string;
  title: string | undefined;
  /** A prompt on it, for want of a name. */
  prompt: string | undefined;
}

interface Props {
  supabase: SupabaseClient;
  workflowId: string;
  /** What is left of the nearest limit, in a sentence. */
  left: string | undefined;
  title: string | undefined;
  /** Undefined where the user may not. */
  onRename: ((title: string) => void) | undefined;
}

export function Canvases({ supabase, workflowId, left, title, onRename }: Props) {
  const [entries, setEntries] = useState<readonly Entry[]>();
  const [said, setSaid] = useState("");
  const popover = useRef<HTMLElement>(null);
  const name = title || UNTITLED;
  useEffect(() => {
    document.title = `${name} · Image Jobs`;
  }, [name]);

  const load = useCallback(async () => {
    const { entries: found, refusal } = await loadCanvases(supabase);
    setEntries(found);
    setSaid(refusal ?? "");
  }, [supabase]);
  const copyLink = async (id: string) => {
    const { data, error } = await supabase.rpc("share_workflow", { workflow_id: id });
    if (error) return setSaid(sentenceOf(error));
    const address = addressOf(id, String(data));
    try {
      await navigator.clipboard.writeText(address);
      setSaid("The link is copied. Who opens it within 7 days becomes a member.");
    } catch {
      setSaid(address); // the browser keeps the clipboard closed
    }
  };
  const open = (id: string) => {
    popover.current?.hidePopover();
    location.hash = id;
  };
  return (
    <>
      <button className="brand" popoverTarget="canvases" aria-label={`${name}: your canvases`} title="Your canvases">
        <svg viewBox="0 0 16 16" width="26" height="26" aria-hidden="true">
          <rect width="16" height="16" rx="4.5" fill="var(--ink)" />
          <circle cx="10.6" cy="5.6" r="1.6" fill="#f0b95b" />
          <path d="M2.6 12.4 6.2 7.6l3.6 4.8zM8.6 12.4l2.2-2.9 2.5 2.9z" fill="var(--paper)" />
        </svg>
        <span dir="auto">{name}</span>
        <Icon name="chevron" />
      </button>
      <section
        className="canvases nokey" id="canvases" popover="auto" aria-label="Your canvases" ref={popover}
        onToggle={event => event.newState === "open" && void load()}
      >
        {onRename && <Name key={workflowId} title={title} onRename={onRename} />}
        <ul>
          {entries?.map(entry => (
            <li key={entry.id}>
              <button
                className="canvases-open" aria-current={entry.id === workflowId ? "page" : undefined} dir="auto"
                data-named={Boolean(entry.title)} onClick={() => open(entry.id)}
              >
                {(entry.id === workflowId ? title : entry.title) || entry.prompt || UNTITLED}
              </button>
              <button
                className="button" data-icon="true" title="Copy a link to share" onClick={() => void copyLink(entry.id)}
                aria-label={`Copy a link to ${entry.title || entry.prompt || UNTITLED}`}
              >
                <Icon path="M6.8 9.2a2.6 2.6 0 0 0 3.7 0l2.2-2.2a2.6 2.6 0 0 0-3.7-3.7l-.9.9M9.2 6.8a2.6 2.6 0 0 0-3.7 0L3.3 9a2.6 2.6 0 0 0 3.7 3.7l.9-.9" />
              </button>
            </li>
          ))}
        </ul>
        {entries?.length === 0 && <p>Nothing yet. Who adds the first picture of a canvas becomes its member.</p>}
        <button className="button" data-strong="true" onClick={() => open(crypto.randomUUID())}>New canvas</button>
        {left && <p>{left}</p>}
        <p role="status">{said}</p>
      </section>
    </>
  );
}

function Name({ title = "", onRename }: { title: string | undefined; onRename: (title: string) => void }) {
  const [text, setText] = useState(title);
  const [last, setLast] = useState(title);
  if (last !== title) { // another window's
    setLast(title);
    setText(title);
  }
  const rename = () => {
    if (text.trim() !== title) onRename(text.trim());
  };
  return (
    <form
      onSubmit={event => {
        event.preventDefault();
        rename();
      }}
    >
      <label htmlFor="canvas-name">Name of this canvas</label>
      <input
        id="canvas-name" value={text} maxLength={MAX_TITLE} placeholder={UNTITLED} dir="auto"
        onChange={event => setText(event.target.value)} onBlur={rename}
      />
    </form>
  );
}

/** Loads the canvases that the user is a member of, the latest first. */
async function loadCanvases(supabase: SupabaseClient): Promise<{ entries: Entry[]; refusal?: string }> {
  const [members, names] = await Promise.all([
    supabase.from("workflow_members").select("workflow_id").order("created_at", { ascending: false }).limit(MAX_CANVASES)
      .returns<{ workflow_id: string }[]>(),
    supabase.from("workflow_nodes").select("id,workflow_id,title:node_data->>title").eq("node_type", "canvas").order("id")
      .returns<{ workflow_id: string; title: string | null }[]>(),
  ]);
  const error = members.error ?? names.error;
  if (error) return { entries: [], refusal: sentenceOf(error) };
  const titles = new Map<string, string>();
  for (const { workflow_id, title } of names.data ?? []) if (title && !titles.has(workflow_id)) titles.set(workflow_id, title);
  const ids = (members.data ?? []).map(({ workflow_id }) => workflow_id);
  const nameless = ids.filter(id => !titles.has(id));
  const { data: nodes } = nameless.length === 0 ? { data: [] } : await supabase.from("workflow_nodes")
    .select("workflow_id,prompt:node_data->promptSpec->>basePrompt").in("workflow_id", nameless)
    .order("created_at", { ascending: false }).limit(MAX_PROMPTS).returns<{ workflow_id: string; prompt: string | null }[]>();
  const prompts = new Map((nodes ?? []).flatMap(({ workflow_id, prompt }) => (prompt ? [[workflow_id, prompt] as const] : [])));
  return { entries: ids.map(id => ({ id, title: titles.get(id), prompt: prompts.get(id) })) };
}
