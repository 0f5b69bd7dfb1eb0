/** Shown on an empty canvas: a prompt field, a few ideas, and a picture of one's own. */
import { useState } from "react";
import { Icon } from "./Icon";
import { keepDraft, readDraft } from "./drafts";

const IDEAS = ["A lighthouse at dusk", "Mountains under a green aurora", "A quiet harbour in the fog"];

interface Props {
  workflowId: string;
  onPrompt: (prompt: string) => void;
  onPicture: () => void;
}

/** What is typed is there again if the database refuses it: the draft is dropped once a node has it. */
export function FirstNode({ workflowId, onPrompt, onPicture }: Props) {
  const [text, setText] = useState(() => {
    const draft = readDraft();
    return draft?.workflowId === workflowId ? draft.text : "";
  });
  const edit = (next: string) => {
    setText(next);
    keepDraft(workflowId, next);
  };
  return (
    <section className="first">
      <div className="first-frames" aria-hidden="true"><i /><i /><i /></div>
      <h1>What should it show?</h1>
      <form
        onSubmit={event => {
          event.preventDefault();
          if (text.trim()) onPrompt(text.trim());
        }}
      >
        <input
          autoFocus value={text} onChange={event => edit(event.target.value)} aria-label="Prompt" dir="auto"
          placeholder="Describe a picture" maxLength={32000}
        />
        <button className="button" data-strong="true" disabled={!text.trim()}>Generate</button>
      </form>
      <p>
        {IDEAS.map(idea => <button key={idea} className="idea" onClick={() => onPrompt(idea)}>{idea}</button>)}
      </p>
      <p>
        <button className="button" onClick={onPicture}><Icon name="picture" />Or start from a picture of yours</button>
      </p>
    </section>
  );
}
