/** What a node's picture is made by: model, shape, quality, seed. Copy this file with ImageNode.tsx. */
import { useId } from "react";
import type { ReactNode } from "react";
import type { ImageNodesValue } from "./ImageNode";
import type { ImageModel, NodeInputPatch, PromptSpec, Quality, WorkflowNode } from "./nodes";

export function NodeSettings({ row, model, shared }: { row: WorkflowNode; model: ImageModel | undefined; shared: ImageNodesValue }) {
  const spec: PromptSpec = row.node_data.promptSpec ?? { basePrompt: "" };
  const editSpec = (promptSpec: NonNullable<NodeInputPatch["promptSpec"]>) => shared.actions.edit(row.id, { promptSpec });
  const sizes = model?.sizes.filter(each => /^\d+x\d+$/.test(each)) ?? []; // "2K" is a size of Google's, and a quality here
  const shape = spec.aspectRatio ? `ratio ${spec.aspectRatio}` : `size ${spec.size ?? "1024x1024"}`;
  return (
    <div className="image-node-settings nodrag nowheel">
      <Field label="Model" wide>
        {name => (
          <select
            id={name} value={`${row.node_data.provider}:${row.node_data.model}`}
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
                    {[each.model, formatPrice(each), formatSeconds(each)].filter(Boolean).join(" · ")}
                  </option>
                ))}
              </optgroup>
            ))}
          </select>
        )}
      </Field>
      <Field label="Shape">
        {name => (
          <select
            id={name} value={shape}
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
        <Field label="Quality">
          {name => (
            <select id={name} value={spec.quality ?? "standard"} onChange={event => editSpec({ quality: event.target.value })}>
              {model.qualities.map(each => <option key={each} value={each}>{QUALITIES[each]}</option>)}
            </select>
          )}
        </Field>
      )}
      {model?.seed && (
        <Field label="Seed">
          {name => (
            <input
              id={name} type="number" min={0} step={1} placeholder="Random" defaultValue={spec.seed ?? ""}
              onChange={event => editSpec({ seed: event.target.validity.valid && event.target.value !== "" ? event.target.valueAsNumber : undefined })}
            />
          )}
        </Field>
      )}
      {model?.negative_prompt && (
        <Field label="Without" wide={!model.seed}>
          {name => (
            <input
              id={name} placeholder="people, text" defaultValue={spec.negativePrompt ?? ""}
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

function Field({ label, wide, children }: { label: string; wide?: boolean; children: (id: string) => ReactNode }) {
  const id = useId();
  return (
    <div className="image-node-field" data-wide={wide}>
      <label htmlFor={id}>{label}</label>
      {children(id)}
    </div>
  );
}

export function formatPrice({ price }: ImageModel): string | undefined {
  return price === null ? undefined : price === 0 ? "free" : `$${price.toFixed(price < 0.1 ? 3 : 2)}`;
}

export function formatSeconds({ typical_seconds: typical }: ImageModel): string | undefined {
  return typical === null ? undefined : `${Math.max(1, Math.round(typical))} s`;
}
