/** The page: a session, the workflow that the address names, and the canvas. */
import { StrictMode, useEffect, useState } from "react";
import { createRoot } from "react-dom/client";
import "@fontsource-variable/geist/wght.css";
import "@xyflow/react/dist/base.css";
import "../../pages/look.css";
import "./canvas.css";
import { Canvas } from "./Canvas";
import { signIn } from "./session";
import { parseAddress, sentenceOf } from "./Sharing";

type Session = Awaited<ReturnType<typeof signIn>>;

function Page({ supabase, workflowId: first }: Session) {
  const [hash, setHash] = useState(location.hash);
  useEffect(() => {
    const onChange = () => setHash(location.hash);
    window.addEventListener("hashchange", onChange);
    return () => window.removeEventListener("hashchange", onChange);
  }, []);
  const { workflowId = first, token } = parseAddress(hash);
  const [refusal, setRefusal] = useState<string>();
  useEffect(() => {
    if (!token) {
      history.replaceState(null, "", `#${workflowId}`);
      return;
    }
    // Joining twice changes nothing. Either way the token leaves the address, which people copy.
    void supabase.rpc("join_workflow", { token }).then(({ data, error }) => {
      setRefusal(error ? sentenceOf(error) : undefined);
      location.replace(`#${error ? workflowId : String(data)}`);
    });
  }, [supabase, workflowId, token]);
  if (token) return <main className="sorry"><p>Joining …</p></main>;
  return <Canvas key={workflowId} supabase={supabase} workflowId={workflowId} refusal={refusal} />;
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
