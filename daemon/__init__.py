"""Image Job Orchestrator: one asyncio daemon that turns pending rows of `runs` into images in Supabase Storage."""
