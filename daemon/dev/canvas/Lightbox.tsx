/** A dialog with one image at full size, its prompt and the details of its run, and the pictures that its node had before. */
import { useEffect, useRef, useState } from "react";
import { Icon } from "./Icon";
import { PastRuns } from "./PastRuns";
import { factsOf, timesOf } from "./facts";
import type { PastRun } from "./history";
import { isUnfinished } from "./nodes";
import { downloadUrl } from "./downloads";
import type { Actions, WorkflowNode } from "./nodes";
import { withoutToken } from "./pictures";

interface Props {
  id: string;
  rows: readonly WorkflowNode[];
  /** Of this node, once it is loaded. */
  history: readonly PastRun[];
  actions: Actions;
  onMove: (id: string) => void;
  onClose: () => void;
}

export function Lightbox({ id, rows, history, actions, onMove, onClose }: Props) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [viewed, setViewed] = useState<string>();
  useEffect(() => {
    actions.openHistory(id);
    setViewed(undefined);
    return () => actions.openHistory(undefined);
  }, [actions, id]);
  const row = rows.find(each => each.id === id);
  const current = history.find(each => each.isShown);
  const run = history.find(each => each.id === viewed) ?? current;
  const url = row?.node_data.imageUrl;
  useEffect(() => dialog.current?.showModal(), []);
  useEffect(() => {
    if (!url) onClose(); // the node was deleted in another window
  }, [url, onClose]);
  if (!row || !url) return null;

  const pictures = rows.filter(each => each.node_data.imageUrl);
  const at = pictures.indexOf(row);
  const move = (step: number) => onMove(pictures.at((at + step) % pictures.length)!.id);
  const address = run && run !== current ? (run.payload.imageUrl ?? run.payload.thumbnailUrl ?? url) : url;
  const key = withoutToken(address); // the picture is not taken away when its address is signed anew
  const { promptSpec, upload } = row.node_data;
  const title = upload?.name ?? (run?.promptSpec ?? promptSpec)?.basePrompt;
  const walk = (step: number) => {
    const next = history[history.findIndex(each => each === run) + step];
    if (next) setViewed(next.id);
  };
  return (
    <dialog
      ref={dialog} className="lightbox nokey" aria-label="Image at full size" onClose={onClose}
      onClick={event => event.target === event.currentTarget && dialog.current?.close()}
      onKeyDown={event => {
        if (event.key === "ArrowRight") move(1);
        if (event.key === "ArrowLeft") move(-1);
        if (event.key === "ArrowUp" || event.key === "ArrowDown") {
          event.preventDefault();
          walk(event.key === "ArrowDown" ? 1 : -1);
        }
      }}
    >
      <figure>
        <img
          key={key} src={address} alt={title || "Image"} onError={() => actions.retryPicture(address)}
          {...(run?.payload.width && run.payload.height && { width: run.payload.width, height: run.payload.height })}
        />
        {history.length > 1 && (
          <PastRuns runs={history} viewed={run?.id} onView={setViewed} onFailure={actions.retryPicture} />
        )}
        <figcaption>
          <div>
            <p dir="auto">{title}</p>
            <p className="facts">{run && factsOf(run).map(fact => <span key={fact}>{fact}</span>)}</p>
            <p className="times">{run && timesOf(run).map(time => <span key={time}>{time}</span>)}</p>
          </div>
          {run && run !== current && (
            <button
              className="button" data-strong="true" onClick={() => void actions.show(id, run.id)} disabled={isUnfinished(row)}
              title={isUnfinished(row) ? "A new picture is under way. Wait for it, or cancel it first." : "Show it on the canvas again"}
            >
              Use this one
            </button>
          )}
          {run && run === current && history.length > 1 && <span className="in-use"><i />On the canvas</span>}
          {pictures.length > 1 && (
            <>
              <button className="button" data-icon="true" onClick={() => move(-1)} aria-label="Previous image"><Icon path="M9.7 3.5 5.2 8l4.5 4.5" /></button>
              <button className="button" data-icon="true" onClick={() => move(1)} aria-label="Next image"><Icon path="M6.3 3.5 10.8 8l-4.5 4.5" /></button>
            </>
          )}
          <a className="button" href={downloadUrl(address, title)}><Icon path="M8 2.5v7.6M4.8 7.2 8 10.4l3.2-3.2M3 13.2h10" />Download</a>
          <button className="button" data-icon="true" onClick={() => dialog.current?.close()} aria-label="Close"><Icon path="m4 4 8 8M12 4l-8 8" /></button>
        </figcaption>
      </figure>
    </dialog>
  );
}
