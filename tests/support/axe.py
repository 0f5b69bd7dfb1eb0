"""Look with axe-core, by its default rules, for what keeps people from using a page."""

from playwright.async_api import Page

from tests.support.postgres import ROOT

SOURCE = ROOT / ".cache/axe/node_modules/axe-core/axe.min.js"
RUN = """async () => (await axe.run({ resultTypes: ["violations"] })).violations.flatMap(
  ({ id, help, nodes }) => nodes.map(({ target, failureSummary }) => `${id}: ${help}\n${target}\n${failureSummary}`))"""
"""All rules run: what passes is only not listed, which takes half of the time."""


async def findings(page: Page) -> list[str]:
    """Return what axe finds in a page as it stands, a text for each element. It is let past the page's own policy of scripts."""
    if not await page.evaluate("'axe' in window"):
        await page.evaluate(SOURCE.read_text())
    found: list[str] = await page.evaluate(RUN)
    return found
