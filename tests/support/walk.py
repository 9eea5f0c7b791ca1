"""A walk through the lesson that looks at everything: `python -m tests.support.walk FOLDER [LANGUAGE]`.

At each step, before it is done and after, it takes a picture in both languages, light and dark, on a laptop, a
projector and a phone, and says what is amiss there: barriers that axe-core finds, texts that are too small, what lies
below the fold, what is cut. It also shows the stage as colour-blind eyes see it, and lays contact sheets out.
"""

import asyncio
import sys
from pathlib import Path

from PIL import Image

from filao.sandbox.steps import STEPS
from tests.support.learner import Learner, browser, learning, sandbox
from tests.support.path import PATH

SIZES = {"laptop": (1280, 720), "projector": (1920, 1080), "phone": (390, 844)}
THEMES = ("light", "dark")
EYES = ("protanopia", "deuteranopia", "tritanopia", "achromatopsia")
LOOKED_AT_BY_ALL = ("kill", "poison", "zombie", "groups")  # steps with the most colours
SPEED = "5"
COLUMNS, THUMB = 3, 620  # of a contact sheet, and pixels of a picture's width in it
PHONE_THUMB = 300

AMISS = Path(__file__).with_name("amiss.js").read_text(encoding="utf-8")


class Walk:
    """One learner's walk, in one language."""

    def __init__(self, learner: Learner, folder: Path) -> None:
        self._learner = learner
        self._folder = folder
        self.amiss: list[str] = []

    async def look(self, name: str) -> None:
        """Take all pictures of what is there now."""
        page, language = self._learner.page, self._learner.language
        for size, (width, height) in SIZES.items():
            await page.set_viewport_size({"width": width, "height": height})
            for theme in THEMES:
                await page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
                await page.evaluate("new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))")
                where = f"{language}-{size}-{theme}"
                await page.screenshot(path=self._folder / f"{where}-{name}.png", full_page=size == "phone")
                amiss: list[str] = await page.evaluate(AMISS)
                amiss += await self._learner.texts_too_small()
                if size == "laptop":
                    amiss += await self._learner.violations()
                self.amiss += [f"{where} {name}: {one}" for one in amiss]
        await page.set_viewport_size({"width": 1280, "height": 720})
        await page.emulate_media(color_scheme="light")

    async def look_with_other_eyes(self, name: str) -> None:
        """Take pictures of the stage as the colour-blind see it."""
        page = self._learner.page
        session = await page.context.new_cdp_session(page)
        for eye in EYES:
            await session.send("Emulation.setEmulatedVisionDeficiency", {"type": eye})
            await page.screenshot(path=self._folder / f"{self._learner.language}-eyes-{name}-{eye}.png")
        await session.send("Emulation.setEmulatedVisionDeficiency", {"type": "none"})


async def walk(learner: Learner, folder: Path) -> list[str]:
    """Go through all steps, and return what is amiss."""
    walking = Walk(learner, folder)
    for number, (step, do) in enumerate(zip(STEPS, PATH, strict=True), 1):
        name = f"{number:02}-{step.key}"
        await learner.go(number)
        await learner.predict(1)
        await walking.look(f"{name}-1-before")
        await do(learner)
        await learner.has_done()
        await walking.look(f"{name}-2-after")
        if step.key in LOOKED_AT_BY_ALL:
            await walking.look_with_other_eyes(name)
    await learner.press(".next")
    await learner.page.wait_for_selector(".paper")
    await walking.look("12-sheet")
    return walking.amiss


def sheets(folder: Path) -> None:
    """Lay the pictures out on contact sheets, one for each language, size and theme."""
    kinds = sorted({path.name.split("-0")[0].split("-1")[0] for path in folder.glob("??-*-*-??-*.png")})
    for kind in kinds:
        width = PHONE_THUMB if "phone" in kind else THUMB
        columns = COLUMNS * (2 if "phone" in kind else 1)
        pictures = [Image.open(path) for path in sorted(folder.glob(f"{kind}-*.png"))]
        small = [one.resize((width, round(one.height * width / one.width))) for one in pictures]
        height = max(one.height for one in small)
        sheet = Image.new("RGB", (width * columns, height * -(-len(small) // columns)), "white")
        for place, one in enumerate(small):
            sheet.paste(one, (place % columns * width, place // columns * height))
        sheet.save(folder / f"sheet-{kind}.png")


async def main(folder: Path, *languages: str) -> None:
    """Walk in both languages or in one, and print what is amiss."""
    folder.mkdir(parents=True, exist_ok=True)
    with sandbox(folder / "files", "--speed", SPEED) as served:
        async with browser() as opened:
            for language in languages or ("en", "fr"):
                async with learning(opened, served, language, reduced_motion="reduce") as learner:
                    for line in await walk(learner, folder):
                        print(line)
    sheets(folder)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
