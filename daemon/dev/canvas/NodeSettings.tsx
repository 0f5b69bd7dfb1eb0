/** What a node's picture is made by: model, shape, quality, seed. Copy this file with ImageNode.tsx. */
import { useEffect, useId, useRef, useState } from "react";
import type { InputHTMLAttributes, ReactNode } from "react";
import type { ImageNodesValue } from "./ImageNode";
import type { ImageModel, NodeInputPatch, PromptSpec, Quality, WorkflowNode } from "./nodes";
import { formatCost } from "./prices";

export function NodeSettings({ row, number, model, shared }: {
  row: WorkflowNode;
  /** The picture's, by which its fields are told from those of others. */
  number: number;
  model: ImageModel | undefined;
  shared: ImageNodesValue;
}) {
  const card = useId();
  const spec: PromptSpec = row.node_data.promptSpec ?? { basePrompt: "" };
  const editSpec = (promptSpec: NonNullable<NodeInputPatch["promptSpec"]>) => shared.actions.edit(row.id, { promptSpec });
  const sizes = model?.sizes.filter(each => /^\d+x\d+$/.test(each)) ?? []; // "2K" is a size of Google's, and a quality here
  const shape = spec.aspectRatio ? `ratio ${spec.aspectRatio}` : `size ${spec.size ?? "1024x1024"}`;
  return (
    <div className="image-node-settings nodrag nowheel">
      <span id={card} hidden>picture {number}</span>
      <Field card={card} label="Model" wide>
        {names => (
          <select
            {...names} value={`${row.node_data.provider}:${row.node_data.model}`}
            onChange={event => {
              const [provider = "", ...rest] = event.target.value.split(":");
              const next = shared.models.find(each => each.provider === provider && each.model === rest.join(":"));
              shared.actions.edit(row.id, ({ promptSpec }) => {
                const keeps = promptSpec?.quality && next?.qualities.includes(promptSpec.quality);
                return { provider, model: rest.join(":"), ...(!keeps && { promptSpec: { quality: undefined } }) };
              });
            }}
          >
            {!model && <option value={`${row.node_data.provider}:${row.node_data.model}`}>{row.node_data.model ?? "Choose one"}</option>}
            {[...new Set(shared.models.map(each => each.provider))].map(provider => (
              <optgroup key={provider} label={provider}>
                {shared.models.filter(each => each.provider === provider).map(each => (
                  <option key={each.model} value={`${each.provider}:${each.model}`}>
                    {[each.model, each === model && formatCost(row.cost), formatSeconds(each)].filter(Boolean).join(" · ")}
                  </option>
                ))}
              </optgroup>
            ))}
          </select>
        )}
      </Field>
      <Field card={card} label="Shape">
        {names => (
          <select
            {...names} value={shape}
            onChange={event => {
              const [kind, value] = event.target.value.split(" ");
              editSpec(kind === "ratio" ? { aspectRatio: value, size: undefined } : { size: value, aspectRatio: undefined });
            }}
          >
            {!(sizes.includes(shape.slice(5)) || model?.ratios.includes(shape.slice(6))) && (
              <option value={shape}>{shape.split(" ")[1]?.replace("x", " × ")}</option>
            )}
            {model && model.ratios.length > 0 && (
              <optgroup label="Ratio">
                {model.ratios.map(each => <option key={each} value={`ratio ${each}`}>{each}</option>)}
              </optgroup>
            )}
            {sizes.length > 0 && (
              <optgroup label="Pixels">
                {sizes.map(each => <option key={each} value={`size ${each}`}>{each.replace("x", " × ")}</option>)}
              </optgroup>
            )}
          </select>
        )}
      </Field>
      {model && model.qualities.length > 0 && (
        <Field card={card} label="Quality">
          {names => (
            <select {...names} value={spec.quality ?? "standard"} onChange={event => editSpec({ quality: event.target.value })}>
              {model.qualities.map(each => <option key={each} value={each}>{QUALITIES[each]}</option>)}
            </select>
          )}
        </Field>
      )}
      {model?.seed && (
        <Field card={card} label="Seed">
          {names => (
            <Text
              {...names} type="number" min={0} step={1} placeholder="Random" saved={String(spec.seed ?? "")}
              onChange={event => editSpec({ seed: event.target.validity.valid && event.target.value !== "" ? event.target.valueAsNumber : undefined })}
            />
          )}
        </Field>
      )}
      {model?.negative_prompt && (
        <Field card={card} label="Without" wide={!model.seed}>
          {names => (
            <Text
              {...names} placeholder="people, text" saved={spec.negativePrompt ?? ""}
              onChange={event => editSpec({ negativePrompt: event.target.value })}
            />
          )}
        </Field>
      )}
      {row.node_data.source && model && !model.previous_image && (
        <p className="image-node-hint">This model cannot start from another image.</p>
      )}
    </div>
  );
}

const QUALITIES: Record<Quality, string> = { low: "Low", standard: "Standard", hd: "High", xhigh: "Very high", max: "Highest" };

/** A field for a text of the node. Edits from other windows, and undone ones, appear while it has not the focus. */
function Text({ saved, onChange, ...rest }: InputHTMLAttributes<HTMLInputElement> & { saved: string }) {
  const [text, setText] = useState(saved);
  const field = useRef<HTMLInputElement>(null);
  useEffect(() => {
    if (document.activeElement !== field.current) setText(saved);
  }, [saved]);
  return (
    <input
      {...rest} ref={field} value={text} onBlur={() => setText(saved)}
      onChange={event => {
        setText(event.target.value);
        onChange?.(event);
      }}
    />
  );
}

interface Names {
  id: string;
  "aria-labelledby": string;
}

/** `card`: the id of what names the picture. */
function Field({ card, label, wide, children }: { card: string; label: string; wide?: boolean; children: (names: Names) => ReactNode }) {
  const id = useId();
  return (
    <div className="image-node-field" data-wide={wide}>
      <label id={`${id}label`} htmlFor={id}>{label}</label>
      {children({ id, "aria-labelledby": `${id}label ${card}` })}
    </div>
  );
}

export function formatSeconds({ typical_seconds: typical }: ImageModel): string | undefined {
  return typical === null ? undefined : `${Math.max(1, Math.round(typical))} s`;
}
