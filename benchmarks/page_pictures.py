"""
The pictures of the page in `docs`, made of generated pairs alone. Needs the extra `web`, playwright and a Chromium.

    python benchmarks/page_pictures.py
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from deltavlm_hf.app.page import build, launch
from deltavlm_hf.inference.loading import NOTES, load_model

SECONDS = 300  # to wait for at most
SIZES = {"page.jpg": {"width": 1280, "height": 800}, "page_phone.jpg": {"width": 390, "height": 844}}


def ask(page: Page, question: str, number: int) -> None:
    page.get_by_role("button", name=question, exact=True).click()
    expect(page.locator("#chat .look")).to_have_count(number)


def photograph(page: Page, address: str) -> Image.Image:
    """One pair, two questions, and what the page looks like then."""
    page.set_default_timeout(SECONDS * 1000)
    page.goto(address)
    page.get_by_role("button", name="Generated 1").click()
    page.locator("#viewer .whole-pair").wait_for()
    ask(page, "How many?", 1)
    ask(page, "Where?", 2)
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder (default: %(default)s)")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    args = parser.parse_args()
    expect.set_options(timeout=SECONDS * 1000)
    demo = build(*load_model("small", "cpu"), note=NOTES["small"])
    launch(demo, prevent_thread_lock=True, quiet=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        for name, size in SIZES.items():
            page = browser.new_context(viewport=size, color_scheme="light").new_page()
            photograph(page, demo.local_url).save(args.output / name, quality=88)
        browser.close()
    demo.close()


if __name__ == "__main__":
    main()
