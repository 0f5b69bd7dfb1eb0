/** The page for whoever runs image-jobs. */
import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import "@fontsource-variable/geist/wght.css";
import "../look.css";
import "./dashboard.css";
import { Dashboard } from "./Dashboard";

createRoot(document.getElementById("dashboard")!).render(<StrictMode><Dashboard /></StrictMode>);
