/** What the parts of a store share. Copy this file with workflow.ts. */
import type { SupabaseClient } from "@supabase/supabase-js";
import type { Database } from "./database.types";
import type { NodeCache } from "./cache";
import type { Connection, Problem } from "./nodes";

/** The columns of workflow_nodes that a store knows. */
export const COLUMNS = "id,workflow_id,node_type,node_data,position,version,pinned_run";

export interface Store {
  readonly id: string;
  readonly supabase: SupabaseClient<Database>;
  readonly nodes: NodeCache;
  connection(): Connection;
  /** Grows when a user signs out or leaves: rows that were asked for before are not shown to the next one. */
  era(): number;
  load(): Promise<void>;
  fetch(ids: string[]): Promise<void>;
  merge(rows: unknown[] | null, era: number): void;
  render(): void;
  tell(problem: Problem): void;
  /** Nothing more is asked until the user signs in or comes back to the window. */
  refuse(problem: Problem): void;
  /** Called after each write: it may be one that a pending run waits for, or make the user a member. */
  written(isNew: boolean): Promise<void>;
}
