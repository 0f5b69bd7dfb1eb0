/** Adds the user's own pictures to the canvas: dropped from the desktop, pasted, or chosen. */
import { useCallback, useEffect, useState } from "react";
import type { DragEvent } from "react";
import type { SupabaseClient } from "@supabase/supabase-js";
import type { Actions, Position } from "./nodes";
import type { Step, UndoableActions } from "./undo";
import type { NewToast } from "./Toasts";
import { Refusal, TYPES, discard, nameOf, removeUnused, shrink, upload } from "./uploads";

interface Options {
  supabase: SupabaseClient;
  workflowId: string;
  actions: UndoableActions;
  /** The store's own, without a memory. */
  remove: Actions["remove"];
  addToast: (toast: NewToast) => void;
  findPlace: (wanted?: Position) => Position;
  reveal: (place: Position) => void;
  /** Whether the user may add anything. */
  isOpen: boolean;
}

export function useSources({ supabase, workflowId, actions, remove, addToast, findPlace, reveal, isOpen }: Options) {
  /** What is being done for a node, in a sentence. */
  const [uploading, setUploading] = useState<ReadonlyMap<string, string>>(new Map());

  const makeRoom = useCallback(async () => {
    try {
      const count = await removeUnused(supabase, workflowId, actions.uploads());
      const message = count === 0 ? "Nothing was removed: each picture here is shown by a node, comes back by Undo, or was added in the last hour."
        : count === 1 ? "One picture was removed, which no node shows." : `${count} pictures were removed, which no node shows.`;
      addToast({ tone: "plain", message, hint: count === 0 ? "Delete what you do not need, or take another canvas." : "Add yours again." });
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      addToast({ tone: "bad", message: error.message, hint: error.hint });
    }
  }, [supabase, workflowId, actions, addToast]);

  const addPicture = useCallback(async (file: File, at?: Position) => {
    const say = (id: string, sentence?: string) => setUploading(now => {
      const next = new Map(now);
      if (sentence) next.set(id, sentence);
      else next.delete(id);
      return next;
    });
    const name = nameOf(file);
    let id: string | undefined;
    let step: Step | undefined;
    try {
      const picture = await shrink(file);
      const { width, height } = picture;
      const place = findPlace(at);
      id = actions.add({ upload: { name, width, height } }, place);
      step = actions.lastStep();
      say(id, `${name} is being uploaded (${formatBytes(picture.blob.size)}).`);
      reveal(place);
      await actions.save(id); // makes the first user of a new workflow its member
      const path = await upload(supabase, workflowId, name, picture);
      if (!actions.now(id)) { // undone, or deleted, meanwhile
        actions.forget(step);
        return await discard(supabase, path);
      }
      actions.edit(id, { upload: { path, name, width, height } });
      await actions.save(id);
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      if (id) void remove(id);
      actions.forget(step); // Undo would bring back a node whose picture is nowhere
      const action = { label: "Make room", run: () => void makeRoom() };
      addToast({ tone: "bad", message: error.message, hint: error.hint, ...(error.isFull && { action }) });
    } finally {
      if (id) say(id);
    }
  }, [supabase, workflowId, actions, remove, addToast, findPlace, reveal, makeRoom]);

  /** One after the other: each finds its place beside the last one. */
  const addPictures = useCallback(async (files: Iterable<File>, at?: Position) => {
    for (const file of [...files]) await addPicture(file, at);
  }, [addPicture]);

  useEffect(() => {
    if (!isOpen) return;
    const onPaste = (event: ClipboardEvent) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (files.length === 0 || event.clipboardData?.getData("text/plain")) return; // a text editor's copy has both
      event.preventDefault();
      void addPictures(files);
    };
    addEventListener("paste", onPaste);
    return () => removeEventListener("paste", onPaste);
  }, [isOpen, addPictures]);

  return { uploading, addPictures };
}

/** Opens the browser's dialog for files. */
export function chooseFiles(onFiles: (files: File[]) => void): void {
  const input = document.createElement("input");
  input.type = "file";
  input.multiple = true;
  input.accept = TYPES.join();
  input.onchange = () => onFiles([...(input.files ?? [])]);
  input.click();
}

/** What the canvas listens to for files from the desktop, and whether some are held over it. */
export function useDrop(isOpen: boolean, onFiles: (files: File[], point: Position) => void) {
  const [isOver, setIsOver] = useState(false);
  useEffect(() => {
    // Beside the canvas, and where nothing may be added: the browser would leave the page, and show the file.
    const stay = (event: globalThis.DragEvent) => event.dataTransfer?.types.includes("Files") && event.preventDefault();
    addEventListener("dragover", stay);
    addEventListener("drop", stay);
    return () => {
      removeEventListener("dragover", stay);
      removeEventListener("drop", stay);
    };
  }, []);
  const hasFiles = (event: DragEvent) => isOpen && event.dataTransfer.types.includes("Files");
  const listeners = {
    onDragOver: (event: DragEvent) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      event.dataTransfer.dropEffect = "copy";
      setIsOver(true);
    },
    onDragLeave: (event: DragEvent) => {
      if (!event.currentTarget.contains(event.relatedTarget as Node | null)) setIsOver(false);
    },
    onDrop: (event: DragEvent) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      setIsOver(false);
      onFiles([...event.dataTransfer.files], { x: event.clientX, y: event.clientY });
    },
  };
  return [isOver, listeners] as const;
}

function formatBytes(bytes: number): string {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}
