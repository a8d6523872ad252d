"""The same interactions and items in the formats of 2014, 2018 and 2023 give the same dataset."""

import gzip
import json
import random
from pathlib import Path

import pytest

from common.artifacts import load_meta
from dataloader.options import ProcessOptions
from dataloader.process import process
from tests.dataloader.helpers import contents, table, write_gz
from tests.dataloader.helpers import process_options as make_options
from tests.dataloader.processing import COMMAND

ROOT = Path(__file__).resolve().parents[3]
NAME = "Industrial_and_Scientific"
REAL = ROOT.parent / "shared" / "data" / NAME
YEARS = ("amazon14", "amazon18", "amazon23")


def write(year: str, raw: Path, events: list[tuple], items: list[dict]) -> None:
    """Events as (user, item, second, rating); items in the fields of 2018, with one image address."""
    if year == "amazon23":
        write_gz(raw / f"{NAME}.jsonl.gz", [json.dumps({
            "rating": rating, "title": "Fine", "text": "Good.", "images": [], "asin": f"variant of {item}",
            "parent_asin": item, "user_id": user, "timestamp": time * 1000, "verified_purchase": True})
            for user, item, time, rating in events])
        write_gz(raw / f"meta_{NAME}.jsonl.gz", [json.dumps({
            "main_category": "Industrial & Scientific", "title": item["title"], "features": item.get("feature", []),
            "description": item["description"], "price": None, "images": [
                {"thumb": "http://h/small.jpg", "large": image, "variant": "MAIN", "hi_res": None}
                for image in item.get("imageURLHighRes", [])],
            "store": item.get("brand"), "categories": item.get("category", []), "details": {"Weight": "1 lb"},
            "parent_asin": item["asin"]}) for item in items])
        return
    reviews = {"amazon14": f"reviews_{NAME}_5.json.gz", "amazon18": f"{NAME}_5.json.gz"}[year]
    write_gz(raw / reviews, [json.dumps({
        "reviewerID": user, "asin": item, "reviewText": "Good.", "overall": rating, "unixReviewTime": time})
        for user, item, time, rating in events])
    in_2014 = [repr({"asin": item["asin"], "title": item["title"], "description": " ".join(item["description"]),
                     "brand": item.get("brand", ""), "categories": [item.get("category", [])],
                     "imUrl": (item.get("imageURLHighRes") or [None])[0], "salesRank": {"Toys": 3}}) for item in items]
    write_gz(raw / f"meta_{NAME}.json.gz", in_2014 if year == "amazon14" else list(map(json.dumps, items)))


def processed(tmp_path: Path, year: str, events: list[tuple], items: list[dict], *flags: str) -> ProcessOptions:
    write(year, tmp_path / year, events, items)
    options = make_options(tmp_path / f"data of {year}", "--dataset", NAME, "--raw_dir", str(tmp_path / year), *flags)
    process(options, COMMAND)
    assert options.source == year  # found from the files
    return options


def recorded(options: ProcessOptions) -> dict[str, dict]:
    """The metas without the keys that name the source."""
    folder = options.folder
    metas = {path.name: load_meta(path, "") for path in (folder.interactions, folder.items, folder.users)}
    for meta in metas.values():
        del meta["raw"], meta["settings"]["source"], meta["settings"]["time_unit"]
    return metas


def catalogue() -> tuple[list[tuple], list[dict]]:
    rng = random.Random(5)
    events = [(f"A{rng.randrange(40)}", f"B{rng.randrange(25):03d}", 1_500_000_000 + rng.randrange(50),
               float(rng.randrange(1, 6))) for _ in range(700)]
    items = [{"asin": f"B{n:03d}", "title": f"Valve &amp; \"pump\" No. {n}'s <b>best</b>",
              "description": [f"It's {n} in.", "", "Made of brass\\steel."][:n % 4],
              "brand": f"Brand {n % 3}" * (n % 5 > 0),
              "category": ["Industrial & Scientific", f"Group {n % 4}"], "feature": [],
              "imageURLHighRes": [f"http://h/{n}.jpg"] * (n % 6 > 0)} for n in range(30)]
    return events, [*items, {**items[0], "title": "A second record"}]


@pytest.mark.slow
@pytest.mark.parametrize("template", ["td", "{title} by {brand} | {categories} | {description}"])
def test_the_three_formats_give_the_same_bytes(tmp_path, template):
    events, items = catalogue()
    made = [processed(tmp_path, year, events, items, "--template", template) for year in YEARS]
    assert contents(made[0].folder) == contents(made[1].folder) == contents(made[2].folder)
    assert recorded(made[0]) == recorded(made[1]) == recorded(made[2])
    texts = table(made[2].folder.items, 'title, "text", image_url')
    assert any(title.startswith('Valve & "pump" No. 7') and "Made of brass\\steel." in text and url == "http://h/7.jpg"
               for title, text, url in texts)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason=f"the real dataset is not there: {REAL}")
def test_the_three_formats_agree_on_the_real_dataset(tmp_path):
    flags = ("--min_user_interactions", "5", "--min_item_interactions", "1")
    real = make_options(tmp_path / "data", "--dataset", NAME, "--raw_dir", str(REAL), *flags)
    process(real, COMMAND)
    meta = load_meta(real.folder.interactions, "")
    assert (meta["num_users"], meta["num_items"], meta["num_interactions"]) == (3285, 3541, 22743)
    with gzip.open(REAL / f"{NAME}.json.gz", "rt", encoding="utf-8") as file:
        reviews = list(map(json.loads, file))
    with gzip.open(REAL / f"meta_{NAME}.json.gz", "rt", encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    events = [(r["reviewerID"], r["asin"], r["unixReviewTime"], r["overall"]) for r in reviews]
    for year in ("amazon14", "amazon23"):
        made = processed(tmp_path, year, events, items, *flags)
        assert contents(made.folder) == contents(real.folder)
        assert recorded(made) == recorded(real)
