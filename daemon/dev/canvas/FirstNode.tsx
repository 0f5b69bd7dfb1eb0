/** Shown on an empty canvas: a prompt field and a few ideas. */
import { useState } from "react";

const IDEAS = ["A lighthouse at dusk", "Mountains under a green aurora", "A quiet harbour in the fog"];

export function FirstNode({ onPrompt }: { onPrompt: (prompt: string) => void }) {
  const [text, setText] = useState("");
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
          autoFocus value={text} onChange={event => setText(event.target.value)} aria-label="Prompt"
          placeholder="Describe a picture" maxLength={32000}
        />
        <button className="button" data-strong="true" disabled={!text.trim()}>Generate</button>
      </form>
      <p>
        {IDEAS.map(idea => <button key={idea} className="idea" onClick={() => onPrompt(idea)}>{idea}</button>)}
      </p>
    </section>
  );
}
