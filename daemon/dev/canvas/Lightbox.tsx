/** A dialog with one image at full size, its prompt and the details of its run. */
import { useEffect, useRef, useState } from "react";
import type { SupabaseClient } from "@supabase/supabase-js";
import { Icon } from "./Icon";
import { downloadUrl } from "./downloads";
import type { Actions, WorkflowNode } from "./nodes";
import { withoutToken } from "./pictures";

/** The keys of a completed run's payload that are shown. */
interface RunPayload {
  width?: number;
  height?: number;
  bytes?: number;
  contentType?: string;
  model?: string;
  cost?: number | null;
  timings?: { generateMs?: number };
}

interface Props {
  supabase: SupabaseClient;
  id: string;
  rows: readonly WorkflowNode[];
  actions: Actions;
  onMove: (id: string) => void;
  onClose: () => void;
}

export function Lightbox({ supabase, id, rows, actions, onMove, onClose }: Props) {
  const dialog = useRef<HTMLDialogElement>(null);
  const row = rows.find(each => each.id === id);
  const url = row?.node_data.imageUrl;
  const key = url && withoutToken(url); // the picture is not taken away when its address is signed anew
  const payload = useRunPayload(supabase, id, key);
  useEffect(() => dialog.current?.showModal(), []);
  useEffect(() => {
    if (!url) onClose(); // the node was deleted in another window
  }, [url, onClose]);
  if (!row || !url) return null;

  const pictures = rows.filter(each => each.node_data.imageUrl);
  const at = pictures.indexOf(row);
  const move = (step: number) => onMove(pictures.at((at + step) % pictures.length)!.id);
  const { promptSpec, upload } = row.node_data;
  const title = upload?.name ?? promptSpec?.basePrompt;
  const details = [
    payload?.model,
    payload?.width && `${payload.width} × ${payload.height}`,
    payload?.contentType?.replace("image/", "").toUpperCase(),
    payload?.bytes && formatBytes(payload.bytes),
    payload?.timings?.generateMs && `${(payload.timings.generateMs / 1000).toFixed(1)} s`,
    payload && (payload.cost === 0 ? "free" : payload.cost ? `$${payload.cost.toFixed(payload.cost < 0.1 ? 4 : 2)}` : "cost unknown"),
    promptSpec?.seed !== undefined && `seed ${promptSpec.seed}`,
  ].filter(Boolean);
  return (
    <dialog
      ref={dialog} className="lightbox" aria-label="Image at full size" onClose={onClose}
      onClick={event => event.target === event.currentTarget && dialog.current?.close()}
      onKeyDown={event => {
        if (event.key === "ArrowRight") move(1);
        if (event.key === "ArrowLeft") move(-1);
      }}
    >
      <figure>
        <img
          key={key} src={url} alt={title || "Image"} onError={() => actions.retryPicture(url)}
          {...(payload?.width && payload.height && { width: payload.width, height: payload.height })}
        />
        <figcaption>
          <div>
            <p dir="auto">{title}</p>
            <p className="facts">{details.map(detail => <span key={String(detail)}>{detail}</span>)}</p>
          </div>
          {pictures.length > 1 && (
            <>
              <button className="button" data-icon="true" onClick={() => move(-1)} aria-label="Previous image"><Icon path="M9.7 3.5 5.2 8l4.5 4.5" /></button>
              <button className="button" data-icon="true" onClick={() => move(1)} aria-label="Next image"><Icon path="M6.3 3.5 10.8 8l-4.5 4.5" /></button>
            </>
          )}
          <a className="button" href={downloadUrl(url, title)}><Icon path="M8 2.5v7.6M4.8 7.2 8 10.4l3.2-3.2M3 13.2h10" />Download</a>
          <button className="button" data-icon="true" onClick={() => dialog.current?.close()} aria-label="Close"><Icon path="m4 4 8 8M12 4l-8 8" /></button>
        </figcaption>
      </figure>
    </dialog>
  );
}

/** Fetches the payload of the node's newest completed run: the image that is shown is its, even during a regeneration. */
function useRunPayload(supabase: SupabaseClient, id: string, key: string | undefined): RunPayload | undefined {
  const [result, setResult] = useState<{ key: string; payload: RunPayload }>();
  useEffect(() => {
    let active = true;
    void supabase.from("runs").select("payload").eq("metadata->>nodeId", id).eq("status", "completed")
      .order("finished_at", { ascending: false }).limit(1).returns<{ payload: RunPayload }[]>()
      .then(({ data }) => {
        if (active && key && data?.[0]) setResult({ key, payload: data[0].payload });
      });
    return () => {
      active = false;
    };
  }, [supabase, id, key]);
  return result?.key === key ? result?.payload : undefined;
}

function formatBytes(bytes: number): string {
  return bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}
