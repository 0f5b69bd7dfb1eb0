/** What pictures will cost together, and what is left to pay for them. */
import { isLimited } from "./availability";
import type { Usage, WorkflowNode } from "./nodes";
import { formatUsd } from "./prices";

export interface Sum {
  usd: number;
  /** How many have a price that nobody knows, or that is still being asked for. */
  unknown: number;
}

export function sumOf(rows: readonly WorkflowNode[]): Sum {
  const costs = rows.map(({ cost }) => cost ?? null);
  return { usd: costs.reduce<number>((sum, cost) => sum + (cost ?? 0), 0), unknown: costs.filter(cost => cost === null).length };
}

/** "$0.48", "$0.48 + 2 unknown", "free"; undefined where nothing is known. */
export function formatSum({ usd, unknown }: Sum, count: number): string | undefined {
  if (count === 0 || unknown === count) return undefined;
  const known = usd === 0 ? "free" : formatUsd(usd);
  return unknown === 0 ? known : `${usd === 0 ? "$0" : known} + ${unknown} unknown`;
}

/** The limit that is nearest to its end, if there is any. */
export function nearestLimit(usage: readonly Usage[]): Usage | undefined {
  return usage.filter(isLimited).sort((one, other) => spentShare(other) - spentShare(one))[0];
}

/** 1: all is spent. */
export function spentShare({ used_images, max_images, used_usd, max_usd }: Usage): number {
  const part = (used: number, max: number | null) => (max === null ? 0 : max === 0 ? 1 : used / max); // of nothing all is spent
  return Math.max(part(used_images, max_images), part(used_usd, max_usd));
}

/** "1 image and $0.80 are left today." */
export function formatLeft({ period, used_images, max_images, used_usd, max_usd }: Usage): string {
  const images = max_images === null ? undefined : Math.max(0, max_images - used_images);
  const usd = max_usd === null ? undefined : Math.max(0, max_usd - used_usd);
  const parts = [
    images !== undefined && `${images} ${images === 1 ? "image" : "images"}`,
    usd !== undefined && `$${usd.toFixed(2)}`,
  ].filter(Boolean);
  const verb = parts.length > 1 || (images ?? 1) !== 1 ? "are" : "is";
  return `${parts.join(" and ")} ${verb} left ${period === "day" ? "today" : "this month"}.`;
}

/** Whether so many pictures are more than is left of any limit. */
export function isOverBudget(count: number, { usd }: Sum, usage: readonly Usage[]): boolean {
  return usage.some(({ used_images, max_images, used_usd, max_usd }) =>
    (max_images !== null && used_images + count > max_images) || (max_usd !== null && used_usd + usd > max_usd));
}
