/** The page: a session, the workflow that the address names, and the canvas. */
import { StrictMode, useEffect, useState } from "react";
import { createRoot } from "react-dom/client";
import "@fontsource-variable/geist/wght.css";
import "@xyflow/react/dist/base.css";
import "./canvas.css";
import { Canvas } from "./Canvas";
import { signIn } from "./session";

type Session = Awaited<ReturnType<typeof signIn>>;

const UUID = /^#([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$/i;

function Page({ supabase, workflowId: first }: Session) {
  const [hash, setHash] = useState(location.hash);
  useEffect(() => {
    const onChange = () => setHash(location.hash);
    window.addEventListener("hashchange", onChange);
    return () => window.removeEventListener("hashchange", onChange);
  }, []);
  const workflowId = UUID.exec(hash)?.[1]?.toLowerCase() ?? first;
  useEffect(() => history.replaceState(null, "", `#${workflowId}`), [workflowId]);
  return <Canvas key={workflowId} supabase={supabase} workflowId={workflowId} />;
}

const root = createRoot(document.getElementById("canvas")!);
signIn().then(
  session => root.render(<StrictMode><Page {...session} /></StrictMode>),
  (error: Error) => root.render(
    <main className="sorry">
      <h1>The canvas cannot be opened.</h1>
      <p>{error.message}</p>
      <button className="button" data-strong="true" onClick={() => location.reload()}>Try again</button>
    </main>,
  ),
);
