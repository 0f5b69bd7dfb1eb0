/**
 * Nodes on the system's clipboard: as text, so that they can be pasted into another canvas, in another window. What is pasted
 * may come from anywhere: it is taken key by key, and what a node may not have is left out or refused.
 */
import type { NodeInput, Position, PromptSpec, Quality, WorkflowNode } from "./nodes";

const FORMAT = "image-jobs/nodes";
const MAX_NODES = 200;
/** Characters. */
const MAX_TEXT = 4_000_000, MAX_PROMPT = 32_000, MAX_NAME = 200;
const MAX_MODIFIERS = 100;
const MAX_PLACE = 1_000_000;
const QUALITIES: readonly Quality[] = ["low", "standard", "hd", "xhigh", "max"];

export interface CopiedNode {
  /** Of the original: sources are named by it. */
  id: string;
  input: NodeInput;
  position: Position;
}

export function toText(nodes: readonly WorkflowNode[]): string {
  const drawn = nodes.filter(({ node_data }) => !node_data.upload); // a picture of one's own stays in its workflow
  const copied = drawn.map(({ id, position, node_data: { provider, model, promptSpec, source } }) =>
    ({ id, position: position ?? { x: 0, y: 0 }, provider, model, promptSpec, source: source ?? undefined }));
  return JSON.stringify({ format: FORMAT, nodes: copied });
}

/**
 * Returns the nodes in a text; undefined if it is not about nodes at all.
 *
 * Throws an error whose message is a sentence for the user if it is, and cannot be pasted.
 */
export function fromText(text: string): CopiedNode[] | undefined {
  if (!text.includes(FORMAT)) return undefined;
  let value: unknown;
  try {
    if (text.length <= MAX_TEXT) value = JSON.parse(text);
  } catch {
    // what was copied is cut off
  }
  const { format, nodes } = toRecord(value);
  if (format !== FORMAT || !Array.isArray(nodes)) throw new Error("What was copied is incomplete. Copy the pictures again.");
  if (nodes.length > MAX_NODES) throw new Error(`At most ${MAX_NODES} pictures can be pasted at once. Copy fewer.`);
  return nodes.map((each, index) => toNode(toRecord(each), index));
}

function toNode({ id, position, provider, model, promptSpec, source }: Record<string, unknown>, index: number): CopiedNode {
  const { x, y } = toRecord(position);
  const spec = toRecord(promptSpec);
  const { quality, seed, styleModifiers } = spec;
  const isModifiers = Array.isArray(styleModifiers) && styleModifiers.length <= MAX_MODIFIERS
    && styleModifiers.every(each => textOf(each, MAX_PROMPT) !== undefined);
  const texts = { size: MAX_NAME, aspectRatio: MAX_NAME, negativePrompt: MAX_PROMPT };
  const named = textOf(provider, MAX_NAME), drawn = textOf(model, MAX_NAME), from = textOf(source, MAX_NAME);
  const kept: PromptSpec = {
    basePrompt: textOf(spec["basePrompt"], MAX_PROMPT) ?? "",
    ...Object.fromEntries(Object.entries(texts).flatMap(([key, max]) => {
      const text = textOf(spec[key], max);
      return text ? [[key, text]] : [];
    })),
    ...(isModifiers && { styleModifiers: styleModifiers as string[] }),
    ...(QUALITIES.includes(quality as Quality) && { quality: quality as Quality }),
    ...(Number.isSafeInteger(seed) && (seed as number) >= 0 && { seed: seed as number }),
  };
  return {
    id: textOf(id, MAX_NAME) ?? String(index),
    input: { ...(named && { provider: named }), ...(drawn && { model: drawn }), ...(from && { source: from }), promptSpec: kept },
    position: { x: toPlace(x), y: toPlace(y) },
  };
}

function toRecord(value: unknown): Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value) ? (value as Record<string, unknown>) : {};
}

function textOf(value: unknown, max: number): string | undefined {
  return typeof value === "string" && value.length <= max ? value : undefined;
}

function toPlace(value: unknown): number {
  return typeof value === "number" && Math.abs(value) <= MAX_PLACE ? value : 0;
}
