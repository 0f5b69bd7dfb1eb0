import { useEffect, useMemo, useState } from "react";
import { createClient } from "@supabase/supabase-js";
import { ReactFlow } from "@xyflow/react";
import "@xyflow/react/dist/style.css";
import type { Database } from "./image-jobs/database.types";
import { ImageNode, ImageNodes, useImageNodes } from "./image-jobs/ImageNode";
import type { Problem } from "./image-jobs/nodes";
import { useWorkflow } from "./image-jobs/useWorkflow";

const supabase = createClient<Database>(import.meta.env.VITE_SUPABASE_URL, import.meta.env.VITE_SUPABASE_ANON_KEY);
const nodeTypes = { image: ImageNode };

export default function App() {
  const [userId, setUserId] = useState<string | null>(); // undefined until it is known
  useEffect(() => {
    const { data } = supabase.auth.onAuthStateChange((_event, session) => setUserId(session?.user.id ?? null));
    return () => data.subscription.unsubscribe();
  }, []);
  if (userId === undefined) return null;
  if (userId === null) return <SignIn />;
  return <Workflow key={userId} />;
}

function SignIn() {
  const [refusal, setRefusal] = useState<string>();
  const signIn = async () => setRefusal((await supabase.auth.signInAnonymously()).error?.message);
  return (
    <>
      <button onClick={signIn}>Start as a guest</button>
      {refusal && <p role="alert">{refusal}</p>}
    </>
  );
}

/** The workflow that the address names: `#<id>?join=<token>` is a shared link, `#<id>` one's own; otherwise it is a new one. */
function Workflow() {
  const [id, setId] = useState<string>();
  const [refusal, setRefusal] = useState<string>();
  useEffect(() => {
    const [named, token] = location.hash.slice(1).split("?join=");
    const open = (workflowId: string) => {
      history.replaceState(null, "", `#${workflowId}`);
      setId(workflowId);
    };
    if (!token) open(named || crypto.randomUUID());
    else void supabase.rpc("join_workflow", { token }).then(({ data, error }) => (data ? open(data) : setRefusal(error?.message)));
  }, []);
  if (refusal) return <p role="alert">{refusal}</p>;
  return id && <Pictures workflowId={id} />;
}

function Pictures({ workflowId }: { workflowId: string }) {
  const [problem, setProblem] = useState<Problem>();
  const [shownId, setShownId] = useState<string>();
  const [link, setLink] = useState<string>();
  const workflow = useWorkflow(supabase, workflowId, { onProblem: setProblem });
  const { nodes, onNodesChange, onNodeDragStop } = useImageNodes(workflow);
  const { actions, models } = workflow;
  const value = useMemo(() => ({ actions, models, open: setShownId }), [actions, models]);
  const shown = workflow.nodes.find(node => node.id === shownId)?.node_data.imageUrl;

  const add = () => {
    const [model] = models;
    actions.add({ provider: model?.provider, model: model?.model }, { x: 340 * workflow.nodes.length, y: 0 });
  };
  const share = async () => {
    const token = await actions.share();
    if (token) setLink(`${location.origin}${location.pathname}#${workflowId}?join=${token}`);
  };
  const signOut = async () => {
    history.replaceState(null, "", location.pathname); // the next guest is no member of this workflow
    await supabase.auth.signOut();
  };

  return (
    <ImageNodes value={value}>
      <header>
        <button onClick={add} disabled={models.length === 0}>New picture</button>
        <button onClick={share} disabled={workflow.nodes.length === 0}>Share</button>
        <button onClick={signOut}>Sign out</button>
        <output>{workflow.isLoading ? "loading" : workflow.connection}</output>
        {link && <input aria-label="Link" readOnly value={link} />}
        {problem && <p role="alert">{problem.message} {problem.hint}</p>}
      </header>
      <main style={{ height: "85svh" }}>{/* React Flow fills its parent, which needs a height. */}
        <ReactFlow
          nodes={nodes} nodeTypes={nodeTypes} onNodesChange={onNodesChange} onNodeDragStop={onNodeDragStop} fitView
          onNodesDelete={deleted => deleted.forEach(node => void actions.remove(node.id))}
        />
      </main>
      {shown && (
        <dialog open onClick={() => setShownId(undefined)}>
          <img src={shown} alt="" style={{ maxWidth: "80vw", maxHeight: "80svh" }} />
        </dialog>
      )}
    </ImageNodes>
  );
}
