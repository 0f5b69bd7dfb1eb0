/**
 * What pictures will cost, by `estimate_cost`: for a model, a size and a quality it is asked once, however many nodes have
 * them, and never for a prompt. Copy this file with workflow.ts, which asks it.
 */
import type { SupabaseClient } from "@supabase/supabase-js";
import type { Database, Json } from "./database.types";
import type { WorkflowNode } from "./nodes";

/** Milliseconds: changes that follow each other are asked for together. */
const PAUSE = 150;

export class Prices {
  readonly #supabase: SupabaseClient<Database>;
  readonly #onChange: () => void;
  /** USD; null: not known to the server either. */
  #prices = new Map<string, number | null>();
  #wanted = new Set<string>();
  /** What is being asked for. */
  #asked = new Set<string>();
  /** Asked for again after `resume`. */
  #refused = new Set<string>();
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor(supabase: SupabaseClient<Database>, onChange: () => void) {
    this.#supabase = supabase;
    this.#onChange = onChange;
  }

  /** Returns what the node's next picture will cost, in USD; null where nobody knows, undefined until it is known. */
  cost(node: WorkflowNode): number | null | undefined {
    return this.#prices.get(keyOf(node) ?? "");
  }

  /** Asks for the prices of nodes, where they are not known. */
  watch(nodes: readonly WorkflowNode[]): void {
    for (const node of nodes) {
      const key = keyOf(node);
      if (key && ![this.#prices, this.#asked, this.#refused].some(known => known.has(key))) this.#wanted.add(key);
    }
    if (this.#wanted.size > 0) this.#timer ??= setTimeout(() => void this.#ask(), PAUSE);
  }

  /** Asks again for what was refused. */
  resume(): void {
    this.#refused.clear();
  }

  close(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#wanted.clear();
  }

  async #ask(): Promise<void> {
    this.#timer = undefined;
    const keys = [...this.#wanted];
    this.#wanted.clear();
    keys.forEach(key => this.#asked.add(key));
    await Promise.all(keys.map(async key => {
      const [processor, quality, size, aspectRatio] = JSON.parse(key) as string[];
      const prompt_spec = Object.fromEntries(Object.entries({ quality, size, aspectRatio }).filter(([, value]) => value)) as Json;
      const { data, error } = await this.#supabase.rpc("estimate_cost", { processor: processor ?? "", prompt_spec });
      this.#asked.delete(key);
      if (error) this.#refused.add(key);
      else this.#prices.set(key, data as number | null);
    }));
    this.#onChange();
  }
}

/** What the price of a node's picture depends on. */
function keyOf({ node_data: { provider, model, promptSpec } }: WorkflowNode): string | undefined {
  const { quality = "", size = "", aspectRatio = "" } = promptSpec ?? {};
  return provider && model ? JSON.stringify([`${provider}:${model}`, quality, size, aspectRatio]) : undefined;
}

/** "$0.053", "free", "price unknown"; undefined until it is known. */
export function formatCost(cost: number | null | undefined): string | undefined {
  if (cost === undefined) return undefined;
  return cost === null ? "price unknown" : cost === 0 ? "free" : formatUsd(cost);
}

/** What a click on a node costs: its picture, and those that have to be made before it. */
export function formatCosts({ cost, missing, missingCost }: WorkflowNode): string | undefined {
  if (!missing || cost == null || missingCost === undefined) return formatCost(cost);
  const sum = missingCost === null ? null : cost + missingCost;
  return sum ? `${formatUsd(sum)} for ${missing + 1} pictures` : formatCost(sum);
}

/** Three digits where it is less than a dime: prices of one image differ there. */
export function formatUsd(usd: number): string {
  return usd < 0.001 ? "under $0.001" : `$${usd.toFixed(usd < 0.1 ? 3 : 2)}`;
}
