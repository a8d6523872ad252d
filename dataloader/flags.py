"""The flags of the data part. All its steps take the same ones, so that one line serves every step."""

from pathlib import Path

from common.cli import Parser, add_force_flag, add_shared_flags

SOURCES = ("amazon14", "amazon18", "amazon23", "movielens", "local")  # a data set that several have: the first
MODALITIES = ("text", "image")
FUSIONS = ("fused-concat", "fused-pca", "fused-align")
DEFAULT_RATIOS = (0.8, 0.1, 0.1)
ITEM_FIELDS = ("title", "description", "brand", "price", "categories", "features", "image")


def make_parser(description: str) -> Parser:
    parser = Parser(description=description, prog="dataloader")
    add_shared_flags(parser)
    add_data_flags(parser)
    parser.add_argument("--device", default="auto", help="where models run")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn at random")
    return parser


def add_data_flags(parser: Parser) -> None:
    """Every flag of every step, so that the whole job takes them too."""
    add_force_flag(parser)
    _add_source_flags(parser.add_argument_group("where the data are from"))
    _add_local_flags(parser.add_argument_group("files of your own (--source local)"))
    _add_processing_flags(parser.add_argument_group("processing"))
    _add_embedding_flags(parser.add_argument_group("embeddings"))


def _add_source_flags(group) -> None:
    group.add_argument("--source", choices=SOURCES, default=None,
                       help="where the data set is from (default: the first of these that has it; "
                            "with --raw_dir, what the files there look like)")
    group.add_argument("--raw_dir", type=Path, default=None, metavar="DIR",
                       help="a folder of raw files that are there already; nothing is downloaded")
    group.add_argument("--mirror", default=None, metavar="URL", help="is asked first, for URL/<file name>")


def _add_local_flags(group) -> None:
    for name in ("interactions", "items"):
        group.add_argument(f"--{name}", type=Path, default=None, metavar="FILE",
                           help=f"CSV, TSV, JSON lines or Parquet (default: {name}.* or the RecBole file in --raw_dir)")
    for column, default in (("user", "user_id"), ("item", "item_id"), ("time", "timestamp"), ("rating", "rating")):
        group.add_argument(f"--{column}_column", default=None, metavar="C",
                           help=f"in the interactions (default: {default}"
                                + ("; it may be missing)" if column == "rating" else ")"))
    group.add_argument("--item_id_column", default=None, metavar="C",
                       help="in the items (default: as --item_column)")
    for field in ITEM_FIELDS:
        group.add_argument(f"--{field}_column", default=None, metavar="C",
                           help=f"in the items (default: {field}, if there)")


def _add_processing_flags(group) -> None:
    group.add_argument("--time_unit", choices=("s", "ms", "us", "date"), default=None,
                       help="of the raw time stamps; date is ISO 8601 (default: the source's YAML)")
    group.add_argument("--bad_lines", choices=("fail", "skip"), default="fail",
                       help="skip: leave out at most 1 %% of lines that cannot be read, and list them")
    group.add_argument("--min_rating", type=float, default=None, metavar="R", help="leave out events rated lower")
    group.add_argument("--duplicates", choices=("keep", "exact", "user_item"), default="keep",
                       help="exact: one event for a user, item and time; user_item: a user's first event with an item")
    for side, named in (("user", "a user"), ("item", "an item")):
        group.add_argument(f"--min_{side}_interactions", type=int, default=None, metavar="N",
                           help=f"k-core: events that {named} needs; 0 switches it off "
                                "(default: the source's YAML, 5)")
    group.add_argument("--template", default="td", metavar="T",
                       help="an item's text: a template of the source's YAML, or pieces like "
                            "'{title} | by {brand}', each left out where its field is empty")
    group.add_argument("--drop_items_without_text", action="store_true",
                       help="leave such items out; else their raw ids stand in for the text")
    group.add_argument("--split", choices=("leave_one_out", "temporal"), default="leave_one_out",
                       help="leave_one_out: a user's last event is test, the one before it valid; "
                            "temporal: one moment for all users")
    group.add_argument("--split_ratios", default=None, metavar="A,B,C",
                       help="temporal: shares of train, valid and test "
                            f"(default: {','.join(map(str, DEFAULT_RATIOS))})")
    group.add_argument("--split_dates", default=None, metavar="D1,D2",
                       help="temporal: when valid and when test begin (ISO 8601, UTC), in place of the ratios")
    group.add_argument("--memory_limit", default="2GB", metavar="M",
                       help="what DuckDB holds in memory; beyond it goes to the disk")
    group.add_argument("--check", action="store_true",
                       help="only look whether the data set's folder, and raw files that are named, are sound; "
                            "nothing is written")
    group.add_argument("--adopt", action="store_true",
                       help="with --check: give sound files of your own the metas that the other stages ask for")
    group.add_argument("--export_recbole", type=Path, default=None, metavar="DIR",
                       help="also write RecBole's atomic files there")


def _add_embedding_flags(group) -> None:
    group.add_argument("--modalities", default=None, metavar="M",
                       help="text, image or text,image (default: what --suffix needs; text)")
    group.add_argument("--suffix", "--embedding_suffix", dest="suffix", default=None, metavar="S",
                       help=f"the embedding that the next stage reads: image, cf, {', '.join(FUSIONS)}, or a name "
                            "for a text embedding (default: td; fused-concat with text,image)")
    group.add_argument("--text_model", default="all-MiniLM-L6-v2", metavar="M",
                       help="sentence-transformers model, by name or path; tfidf (no model at all); or api:<name>")
    group.add_argument("--api_url", default=None, metavar="URL",
                       help="OpenAI-compatible endpoint (default: $OPENAI_BASE_URL, else OpenAI's); "
                            "its key is taken from $OPENAI_API_KEY")
    group.add_argument("--api_rate", type=float, default=5.0, metavar="R", help="requests a second")
    group.add_argument("--pca", type=int, default=None, metavar="N", help="reduce to so many dimensions")
    group.add_argument("--whiten", action="store_true", help="with --pca: every dimension to unit variance")
    group.add_argument("--zscore", action="store_true", help="every dimension to mean 0 and deviation 1")
    group.add_argument("--l2", action="store_true", help="every vector to length 1")
    group.add_argument("--image_model", default="clip-ViT-B-32", metavar="M", help="CLIP model, by name or path")
    group.add_argument("--image_rate", type=float, default=20.0, metavar="R", help="image requests a second")
    group.add_argument("--min_image_side", type=int, default=10, metavar="N",
                       help="pixels; a smaller image is a placeholder, and counts as missing")
    group.add_argument("--missing_images", choices=("mask", "error"), default="mask",
                       help="mask: such an item gets the mean vector and is marked in the mask file")
    group.add_argument("--fusion_parts", default="td,image", metavar="S,S", help="the embeddings that are fused")
    group.add_argument("--fusion_weights", default=None, metavar="W,W", help="one a part (default: all 1)")
    group.add_argument("--fusion_dim", type=int, default=128, metavar="N", help="of fused-pca and fused-align")
