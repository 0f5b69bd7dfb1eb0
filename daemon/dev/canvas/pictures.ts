/**
 * The addresses of pictures in a private bucket: signs their paths in batches, and renews them while the workflow is open.
 * Of a public bucket's pictures nothing is asked, but of those that failed to load twice. It knows no framework. Copy this file with workflow.ts.
 *
 * A signature is good for ten minutes and renewed in the last four of them, all at once: one request for a canvas. It is
 * looked at by the clock, not by a timer of its own: a computer that slept has missed its timers.
 */
import type { SupabaseClient } from "@supabase/supabase-js";
import type { NodeInput, NodeState, Problem, Upload, WorkflowNode } from "./nodes";

/** The bucket of what users upload to start from. */
export const SOURCES = "image-sources";

/** Seconds. */
const VALID_FOR = 600;
/** Milliseconds: the age at which a signature is renewed, and how long before it may be, with others. */
const RENEW_AFTER = 480_000, RENEW_EARLY = 120_000;
/** Milliseconds: a younger signature is not the reason why a picture does not load. Doubled with each failure. */
const FRESH = 5_000;
/** Milliseconds between two requests while Storage is in trouble: doubled each time. */
const FIRST_PAUSE = 2_000, LONGEST_PAUSE = 30_000;
/** Milliseconds: a request that lasts longer counts as one without a response. supabase-js would wait for ever. */
const TIMEOUT = 20_000;
const MAX_PATHS = 500;
const DEFAULT_BUCKET = "images";
const STORED = /\/storage\/v1\/object\/(public|authenticated)\/([^/?#]+)\/([^?#]+)(?:\?v=(\w+))?/;

/** Ends the address at which a public picture is loaded for the second time. */
const AGAIN = "again=1";

const KINDS = ["preview", "image", "thumbnail"] as const;
type Kind = (typeof KINDS)[number];

/** An object of a private bucket. */
interface Place {
  kind: Kind;
  key: string;
  bucket: string;
  path: string;
  /** Of its content: the same path may get another. */
  version: string | undefined;
  /** Its address in a public bucket, for want of a signed one. */
  publicUrl: string | undefined;
}

interface Signature {
  url: string;
  /** Milliseconds since 1970, by this computer's clock. */
  renewAt: number;
  /** It did not load. */
  hasFailed?: boolean;
  /** How many in a row have failed. */
  failures: number;
}

/** A node as it was last shown. */
interface ShownNode {
  node: WorkflowNode;
  urls: (string | undefined)[];
  result: WorkflowNode;
}

export class Pictures {
  readonly #supabase: SupabaseClient;
  readonly #onChange: () => void;
  readonly #onProblem: (problem: Problem) => void;
  #signatures = new Map<string, Signature>();
  /** What the nodes show, by key. */
  #wanted = new Map<string, Place>();
  #shown = new Map<string, ShownNode>();
  #originals = new WeakMap<WorkflowNode, WorkflowNode>();
  /** How often, once or twice, the picture of a public bucket did not load: then the bucket may have become private. */
  #failures = new Map<string, number>();
  /** Paths that Storage does not sign: they are not asked for again before `resume`. */
  #missing = new Set<string>();
  #toldMissing = new Set<string>();
  /** Storage has refused all: nothing is asked before `resume`. */
  #isRefused = false;
  #isTold = false;
  #pause = 0;
  #pausedUntil = 0;
  #isSigning = false;
  /** Grows with `clear`: signatures that were asked for before are another user's. */
  #era = 0;

  /** `onChange` is called when `show` would return something else. */
  constructor(supabase: SupabaseClient, onChange: () => void, onProblem: (problem: Problem) => void) {
    this.#supabase = supabase;
    this.#onChange = onChange;
    this.#onProblem = onProblem;
  }

  /**
   * Returns the nodes with addresses that a browser can load. One that is not signed yet is left out; where the node had a
   * picture before, that one stays meanwhile. A node stays the same object until it, or an address, changes.
   */
  show(nodes: WorkflowNode[]): WorkflowNode[] {
    const shown = new Map<string, ShownNode>();
    this.#wanted.clear();
    const results = nodes.map(node => {
      const places = KINDS.map(kind => this.#locate(node.node_data, kind));
      if (places.every(place => place === undefined)) return node;
      const last = this.#shown.get(node.id);
      const urls = places.map((place, index) => {
        if (!place) return node.node_data[`${KINDS[index]!}Url`];
        if (place.publicUrl && this.#failures.get(place.key) === 1) return place.publicUrl;
        this.#wanted.set(place.key, place);
        const signed = this.#url(place) ?? place.publicUrl;
        return signed ?? (this.#missing.has(place.key) ? undefined : last?.urls[index]);
      });
      const isSame = last?.node === node && last.urls.every((url, index) => url === urls[index]);
      const result = isSame ? last.result : withUrls(node, urls);
      shown.set(node.id, { node, urls, result });
      this.#originals.set(result, node);
      return result;
    });
    this.#shown = shown;
    return results;
  }

  /** Returns the node as the database has it. */
  original(node: WorkflowNode): WorkflowNode {
    return this.#originals.get(node) ?? node;
  }

  /** Signs what has no signature, and renews in time; to be called now and then. While it is hidden nothing is renewed. */
  async sign(): Promise<void> {
    if (this.#isSigning) return;
    this.#isSigning = true;
    const era = this.#era;
    try {
      for (let due = this.#due(); due.length > 0 && era === this.#era; due = this.#due()) await this.#signBatch(due);
    } finally {
      if (era === this.#era) this.#isSigning = false; // otherwise another user's pictures are being signed by now
    }
  }

  /** Asks again for what was refused: the user, or the connection, is back. */
  resume(): void {
    this.#isRefused = false;
    this.#missing.clear();
    // What could not be signed either was no matter of the bucket. The others would fail twice again, at each focus.
    for (const key of this.#failures.keys()) if (!this.#signatures.has(key)) this.#failures.delete(key);
    this.#pause = this.#pausedUntil = 0;
    void this.sign();
  }

  /**
   * An address did not load: signs it anew, or a little later if that was done just now. A public one is loaded once more
   * before that: the connection may have failed.
   */
  retry(url: string): void {
    const [, access, bucket = "", path = ""] = STORED.exec(url) ?? [];
    if (access === "public") {
      const key = `${bucket}/${path}`;
      this.#failures.set(key, url.endsWith(AGAIN) ? 2 : (this.#failures.get(key) ?? 1)); // several may show the first one
      this.#onChange();
    }
    for (const signature of this.#signatures.values()) {
      if (signature.hasFailed || !url.startsWith(signature.url)) continue;
      const age = Date.now() + RENEW_AFTER - signature.renewAt;
      const pause = age < FRESH || signature.failures > 0 ? FRESH * 2 ** signature.failures : 0;
      signature.renewAt = Math.min(signature.renewAt, Date.now() + pause);
      signature.hasFailed = true;
      signature.failures += 1;
    }
    void this.sign();
  }

  /** Forgets what was another user's. */
  clear(): void {
    this.#era += 1;
    for (const each of [this.#signatures, this.#wanted, this.#shown, this.#failures, this.#toldMissing]) each.clear();
    this.#isTold = this.#isSigning = false;
    this.resume();
  }

  /** Returns where a node's picture lies, if its address has to be signed. */
  #locate(data: NodeState & NodeInput, kind: Kind): Place | undefined {
    if (data.upload?.path && kind === "image") {
      const { path } = data.upload;
      return { kind, key: `${SOURCES}/${path}`, bucket: SOURCES, path, version: undefined, publicUrl: undefined };
    }
    const url = data[`${kind}Url`], known = data[`${kind}Path`];
    const [, access, bucket = DEFAULT_BUCKET, named, version] = STORED.exec(url ?? "") ?? [];
    const path = known ?? named, key = `${bucket}/${path}`;
    if (!path || (access === "public" && !this.#failures.has(key)) || (url !== undefined && access === undefined)) return undefined;
    return { kind, key, bucket, path, version, publicUrl: access === "public" ? again(url!) : undefined };
  }

  #url({ key, version }: Place): string | undefined {
    const url = this.#signatures.get(key)?.url;
    return url && version ? `${url}&v=${version}` : url;
  }

  /** Returns the next paths to sign, all of one bucket. */
  #due(): Place[] {
    const now = Date.now();
    if (this.#isRefused || now < this.#pausedUntil) return [];
    const left = ({ key }: Place) => {
      const time = (this.#signatures.get(key)?.renewAt ?? now) - now;
      return time > RENEW_AFTER ? 0 : time; // the clock was set back
    };
    const isHidden = globalThis.document?.visibilityState === "hidden";
    const places = [...this.#wanted.values()].filter(({ key }) => !this.#missing.has(key));
    const first = places.find(place => (isHidden ? !this.#signatures.has(place.key) : left(place) <= 0));
    return places.filter(place => place.bucket === first?.bucket && left(place) < RENEW_EARLY).slice(0, MAX_PATHS);
  }

  /** Asks for signatures, and keeps them. */
  async #signBatch(places: Place[]): Promise<void> {
    const era = this.#era;
    const renewAt = Date.now() + RENEW_AFTER;
    const bucket = this.#supabase.storage.from(places[0]!.bucket);
    const { data, error } = await inTime(bucket.createSignedUrls(places.map(({ path }) => path), VALID_FOR))
      .catch((error: Error) => ({ data: null, error })); // what came is no list
    if (era !== this.#era) return;
    if (error) return this.#fail(error);
    this.#isTold = false;
    this.#pause = 0;
    const urls = new Map(data.map(({ path, signedUrl }) => [path, signedUrl]));
    for (const { key, path } of places) {
      const url = urls.get(path), last = this.#signatures.get(key);
      if (url) this.#signatures.set(key, { url, renewAt, failures: last?.hasFailed ? last.failures : 0 });
      else this.#missing.add(key);
    }
    for (const key of this.#signatures.keys()) if (!this.#wanted.has(key)) this.#signatures.delete(key);
    this.#tellMissing(places.filter(({ kind, key }) => kind === "image" && this.#missing.has(key) && this.#wanted.has(key)));
    this.#onChange();
  }

  /** A preview may go before it is signed, and a thumbnail goes with its image. */
  #tellMissing(places: Place[]): void {
    const news = places.filter(({ key }) => !this.#toldMissing.has(key));
    news.forEach(({ key }) => this.#toldMissing.add(key));
    if (news.length === 0) return;
    const message = news.length === 1 ? "A picture cannot be shown." : `${news.length} pictures cannot be shown.`;
    this.#onProblem({ message, hint: "It was deleted, or you may not see it. Generate it anew." });
  }

  /** Without a response nothing is said: the store says that it is offline. */
  #fail({ message, status = 0 }: StorageFailure): void {
    const isAway = status === 0 || status >= 500 || status === 429 || status === 408;
    this.#isRefused = !isAway;
    this.#pause = Math.min(Math.max(2 * this.#pause, FIRST_PAUSE), LONGEST_PAUSE);
    this.#pausedUntil = Date.now() + this.#pause;
    if (this.#isTold || status === 0) return;
    this.#isTold = true;
    const hint = isAway ? "They are asked for again, with pauses." : "Come back to this window to ask again.";
    this.#onProblem({ message: `The pictures cannot be shown: ${message}`, hint });
  }
}

/** An error of supabase-js; without a response it has no status. */
interface StorageFailure {
  message: string;
  status?: number | undefined;
}

/** Returns the response to a request, and throws when it does not come in time. */
async function inTime<T>(request: Promise<T>): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_resolve, reject) => {
    timer = setTimeout(() => reject(new Error("Storage did not respond in time.")), TIMEOUT);
  });
  return Promise.race([request, late]).finally(() => clearTimeout(timer));
}

/** Returns the address of an uploaded picture, as a run's `previousImage` names it. */
export function sourceAddress(supabase: Pick<SupabaseClient, "storage">, { path }: Upload): string | undefined {
  if (!path) return undefined;
  const { publicUrl } = supabase.storage.from(SOURCES).getPublicUrl(path).data;
  return publicUrl.replace("/object/public/", "/object/authenticated/");
}

function again(url: string): string {
  return `${url}${url.includes("?") ? "&" : "?"}${AGAIN}`;
}

/** Returns what stays the same of an address when it is signed anew. */
export function withoutToken(url: string): string {
  return url.replace(/\?token=[^&]*/, "");
}

/** Returns a node with these addresses, in the order of KINDS, and no others. */
function withUrls(node: WorkflowNode, urls: (string | undefined)[]): WorkflowNode {
  const data = { ...node.node_data };
  KINDS.forEach((kind, index) => {
    const url = urls[index];
    if (url) data[`${kind}Url`] = url;
    else delete data[`${kind}Url`];
  });
  return { ...node, node_data: data };
}
