/** The Realtime channel of a workflow: what members are told of its nodes and runs. Copy this file with workflow.ts, which joins it. */
import type { RealtimeChannel, SupabaseClient } from "@supabase/supabase-js";
import type { Database } from "./database.types";
import type { Connection, NodeMessage, RunMessage } from "./nodes";

interface Handlers {
  /** Whether anybody still wants to be told. */
  isOpen: () => boolean;
  onNodes: (messages: NodeMessage[]) => void;
  onRuns: (runs: readonly RunMessage[]) => void;
  /** At each SUBSCRIBED: what was missed has to be fetched. */
  onLive: () => void;
  /** Not a member, or not yet. */
  onDenied: () => void;
  onChange: () => void;
}

export class Channel {
  readonly #supabase: SupabaseClient<Database>;
  readonly #workflowId: string;
  readonly #handlers: Handlers;
  connection: Connection = "connecting";
  #channel: RealtimeChannel | undefined;
  #left: Promise<unknown> | undefined;

  constructor(supabase: SupabaseClient<Database>, workflowId: string, handlers: Handlers) {
    this.#supabase = supabase;
    this.#workflowId = workflowId;
    this.#handlers = handlers;
  }

  /** Whether the server, or other code with the same client, has closed it. */
  get isLost(): boolean {
    return this.connection === "away" && this.#channel === undefined;
  }

  async join(): Promise<void> {
    await this.#left; // until then `channel()` returns the old one
    // Without this the first join goes out as anon, and is refused after five seconds.
    await this.#supabase.realtime.setAuth();
    if (!this.#handlers.isOpen() || this.#channel) return;
    const channel = this.#supabase.channel(`workflow:${this.#workflowId}`, { config: { private: true } });
    this.#channel = channel;
    const { onNodes, onRuns, onLive, onDenied, onChange } = this.#handlers;
    // A message may still be on its way when the user has left.
    channel
      .on("broadcast", { event: "nodes_changed" }, ({ payload }) => {
        if (this.#channel === channel) onNodes((payload as { nodes: NodeMessage[] }).nodes);
      })
      .on("broadcast", { event: "runs_changed" }, ({ payload }) => {
        if (this.#channel === channel) onRuns((payload as { runs: RunMessage[] }).runs);
      })
      .subscribe((status, error) => {
        if (this.#channel !== channel) return;
        if (status === "SUBSCRIBED") {
          this.connection = "live";
          onLive();
        } else if (error && /unauthorized/i.test(error.message)) {
          this.connection = "denied";
          void this.leave(); // it would try again for ever
          onDenied();
        } else {
          this.connection = "away";
          if (status === "CLOSED") this.#channel = undefined; // by the server: nobody else joins it again
        }
        onChange();
      });
  }

  /** A user who has just become a member joins at once. */
  async rejoin(): Promise<void> {
    await this.leave();
    await this.join();
  }

  async leave(): Promise<void> {
    const channel = this.#channel;
    this.#channel = undefined;
    if (channel) await (this.#left = this.#supabase.removeChannel(channel));
  }
}
