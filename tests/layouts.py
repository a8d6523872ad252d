"""Small files in the layouts of popular datasets.

All layouts have the same 72 events: user u of 12 uses the items u, u + 1, …, u + 5 (modulo 8), one item per day.
"""

import csv
import gzip
import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import duckdb

NUM_USERS, NUM_ITEMS, NUM_DAYS = 12, 8, 6
FIRST = 1_577_836_800  # 2020-01-01 00:00:00 UTC
EVENTS = [(user, (user + day) % NUM_ITEMS, FIRST + 86_400 * day + 60 * user)
          for user in range(NUM_USERS) for day in range(NUM_DAYS)]
TITLES = [f'Lamp "No. {item}", blue' for item in range(NUM_ITEMS)]


def amazon_2014(raw: Path) -> None:
    _jsonl(raw / "reviews_Baby_5.json.gz", ({"reviewerID": f"A{user}", "asin": f"B{item}", "overall": 5.0,
                                             "unixReviewTime": time} for user, item, time in EVENTS))
    _literals(raw / "meta_Baby.json.gz", ({"asin": f"B{item}", "title": title, "categories": [["Baby", "Lamps"]]}
                                          for item, title in enumerate(TITLES)))


def amazon_parquet(raw: Path) -> None:
    for part in range(2):
        _parquet(raw / "raw_review_Baby_Products" / f"000{part}.parquet", [
            {"rating": 4.0, "title": "Fine", "text": "It works", "images": [], "asin": f"B{item}x",
             "parent_asin": f"B{item}", "user_id": f"AE{user}", "timestamp": time * 1000, "helpful_vote": 0,
             "verified_purchase": True} for user, item, time in EVENTS[part::2]])
    _parquet(raw / "raw_meta_Baby_Products" / "0000.parquet", [
        {"main_category": "Baby", "title": title, "average_rating": 4.5, "rating_number": 9, "features": ["Bright"],
         "description": ["For the", "night"], "price": "9.5", "store": "Lampe", "categories": ["Baby", "Lamps"],
         "images": {"hi_res": [None], "large": [f"http://127.0.0.1/{item}.jpg"], "thumb": ["t.jpg"],
                    "variant": ["MAIN"]}, "details": "{}", "parent_asin": f"B{item}", "bought_together": None}
        for item, title in enumerate(TITLES)])


def amazon_ratings(raw: Path) -> None:
    _csv(raw / "Baby_Products.csv", ["user_id", "parent_asin", "rating", "timestamp"],
         ((f"AE{user}", f"B{item}", "5.0", time * 1000) for user, item, time in EVENTS))


def movielens(raw: Path) -> None:
    _csv(raw / "ratings.csv", ["userId", "movieId", "rating", "timestamp"],
         ((user, item, 3.5, time) for user, item, time in EVENTS))
    _csv(raw / "movies.csv", ["movieId", "title", "genres"],
         ((item, title, "Comedy|Drama") for item, title in enumerate(TITLES)))


def yelp(raw: Path) -> None:
    _jsonl(raw / "yelp_academic_dataset_review.json", (
        {"review_id": f"r{number}", "user_id": f"-u_{user}", "business_id": f"b--{item}", "stars": 4.0, "useful": 0,
         "funny": 0, "cool": 0, "text": "Nice\nplace", "date": _date(time)}
        for number, (user, item, time) in enumerate(EVENTS)))
    _jsonl(raw / "yelp_academic_dataset_business.json", (
        {"business_id": f"b--{item}", "name": title, "city": "Tampa", "stars": 3.5,
         "attributes": {"WiFi": "u'free'"}, "categories": "Lamps, Shopping", "hours": None}
        for item, title in enumerate(TITLES)))


def steam(raw: Path) -> None:
    _literals(raw / "steam_reviews.json.gz", ({"username": f"user {user}", "hours": 1.5, "product_id": str(item),
                                               "page": 1, "date": _date(time)[:10], "text": "It's fun"}
                                              for user, item, time in EVENTS))
    _literals(raw / "steam_games.json.gz", ({"id": str(item), "app_name": title, "genres": ["Action", "Indie"],
                                             "price": 4.99, "early_access": False}
                                            for item, title in enumerate(TITLES)))


def goodreads(raw: Path) -> None:
    form = "%a %b %d %H:%M:%S -0800 %Y"  # 8 hours before UTC
    _jsonl(raw / "goodreads_interactions_poetry.json.gz", (
        {"user_id": f"{user:032x}", "book_id": str(item), "review_id": "a", "is_read": True, "rating": user % 6,
         "review_text_incomplete": "", "date_added": datetime.fromtimestamp(time - 8 * 3600, UTC).strftime(form)}
        for user, item, time in EVENTS))
    _jsonl(raw / "goodreads_books_poetry.json.gz", (
        {"book_id": str(item), "title": title, "description": "Poems.", "image_url": "http://127.0.0.1/1.jpg",
         "authors": [{"author_id": "7", "role": ""}], "popular_shelves": [{"count": "3", "name": "poetry"}]}
        for item, title in enumerate(TITLES)))


def retailrocket(raw: Path) -> None:
    _csv(raw / "events.csv", ["timestamp", "visitorid", "event", "itemid", "transactionid"],
         ((time * 1000, user, "view", item, "") for user, item, time in EVENTS))
    for part, time in ((1, 1_431_226_800_000), (2, 1_433_041_200_000)):
        _csv(raw / f"item_properties_part{part}.csv", ["timestamp", "itemid", "property", "value"],
             ((time, item, name, value) for item in range(NUM_ITEMS)
              for name, value in (("categoryid", item + part), ("888", "1116713 960601 n277.200"))))


def hm(raw: Path) -> None:
    _csv(raw / "transactions_train.csv", ["t_dat", "customer_id", "article_id", "price", "sales_channel_id"],
         ((_date(time)[:10], f"{user:064x}", f"0{item:09d}", 0.05, 2) for user, item, time in EVENTS))
    _csv(raw / "articles.csv", ["article_id", "product_code", "prod_name", "product_type_name", "detail_desc"],
         ((f"0{item:09d}", "0", title, "Lamp", "Jersey top, blue.") for item, title in enumerate(TITLES)))


def kuairec(raw: Path) -> None:
    _csv(raw / "big_matrix.csv", ["user_id", "video_id", "play_duration", "video_duration", "time", "date",
                                  "timestamp", "watch_ratio"],
         ((user, item, 9, 9, _date(time) + ".438", _date(time)[:10].replace("-", ""), f"{time}.438", 1.25)
          for user, item, time in EVENTS))
    _csv(raw / "kuairec_caption_category.csv", ["video_id", "manual_cover_text", "caption", "topic_tag",
                                                "first_level_category_id", "first_level_category_name"],
         ((item, "UNKNOWN", title, "[a,b]", 8, "家居") for item, title in enumerate(TITLES)))


def yoochoose(raw: Path) -> None:
    _csv(raw / "yoochoose-clicks.dat", None, (
        (user, _date(time).replace(" ", "T") + ".277Z", 214_536_000 + item, "S") for user, item, time in EVENTS))


def mind(raw: Path) -> None:
    (raw / "behaviors.tsv").write_text("".join(
        f"{number}\tU{user}\t{datetime.fromtimestamp(time, UTC):%m/%d/%Y %I:%M:%S %p}\tN5 N6\tN99-0 N{item}-1 N98-0\n"
        for number, (user, item, time) in enumerate(EVENTS)), encoding="utf-8")
    (raw / "news.tsv").write_text("".join(
        f"N{item}\tlifestyle\tlamps\t{title}\tAn abstract\thttp://127.0.0.1/{item}\t[]\t"
        f'[{{"Label": "Lamp", "Type": "P"}}]\n' for item, title in enumerate(TITLES)), encoding="utf-8")


def lastfm(raw: Path) -> None:
    lines = [f'user_{user:06d}\t{_date(time).replace(" ", "T")}Z\ta-{item}\t{TITLES[item]}\t\tThe 12" Mix'
             for user, item, time in EVENTS]
    lines.append("user_000000\t2009-05-04T23:08:57Z\t\tUnknown Artist\t\tTrack")  # an artist without an id
    (raw / "userid-timestamp-artid-artname-traid-traname.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def rees46(raw: Path) -> None:
    _csv(raw / "2019-Oct.csv", ["event_time", "event_type", "product_id", "category_id", "category_code", "brand",
                                "price", "user_id", "user_session"],
         ((_date(time) + " UTC", "view", item, 2103807459595387724, TITLES[item], "lucente", 35.79 + user, user, "s")
          for user, item, time in EVENTS))


def recbole(raw: Path) -> None:
    (raw / "shop.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "".join(
        f"{user}\t{item}\t4\t{time}.0\n" for user, item, time in EVENTS), encoding="utf-8")
    (raw / "shop.item").write_text("item_id:token\tname:token_seq\n" + "".join(
        f"{item}\t{title}\n" for item, title in enumerate(TITLES)), encoding="utf-8")


def _date(time: int) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _csv(path: Path, header: list[str] | None, rows: Iterable[tuple]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([*([header] if header else []), *rows])


def _jsonl(path: Path, records: Iterable[dict]) -> None:
    _lines(path, records, json.dumps)


def _literals(path: Path, records: Iterable[dict]) -> None:
    _lines(path, records, repr)


def _lines(path: Path, records: Iterable[dict], form: Callable[[dict], str]) -> None:
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(form(record) + "\n" for record in records)


def _parquet(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = path.with_suffix(".jsonl")
    _jsonl(lines, records)
    duckdb.sql(f"COPY (FROM read_json('{lines}')) TO '{path}'")
    lines.unlink()
