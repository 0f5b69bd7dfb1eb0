/** The icons of a node, and of the page. Copy this file with ImageNode.tsx. */

const ICONS = {
  chevron: "M4.5 6.3 8 9.8l3.5-3.5",
  expand: "M9.6 2.8h3.6v3.6M13 3 9.2 6.8M6.4 13.2H2.8V9.6M3 13l3.8-3.8",
  refine: "M2.5 8h5.5M5.8 5.2 8.6 8l-2.8 2.8M12 2.8l.7 1.9 1.9.7-1.9.7-.7 1.9-.7-1.9-1.9-.7 1.9-.7z",
  picture: "M2.5 4.4a1.9 1.9 0 0 1 1.9-1.9h7.2a1.9 1.9 0 0 1 1.9 1.9v7.2a1.9 1.9 0 0 1-1.9 1.9H4.4a1.9 1.9 0 0 1-1.9-1.9zM2.8 11.2 6 8l3 3 1.8-1.7 2.4 2.3M10.2 5.9h.01",
};

export function Icon({ name, path }: { name?: keyof typeof ICONS; path?: string }) {
  return (
    <svg viewBox="0 0 16 16" width="16" height="16" fill="none" stroke="currentColor" strokeWidth="1.4"
      strokeLinecap="round" strokeLinejoin="round" aria-hidden="true">
      <path d={name ? ICONS[name] : path} />
    </svg>
  );
}
