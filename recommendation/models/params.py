"""A recommender's own parameters, each read with what it may be."""

from common.errors import ConfigError, nearest


class Params:
    """`config["<name>"]["model_params"]`; raises ConfigError for a value that the model could make nothing of."""

    def __init__(self, config: dict, name: str):
        self.values, self.where = config[name]["model_params"], f"{name}.model_params"

    def choice(self, key: str, *words: str) -> str:
        """One of a few words."""
        value = self.values[key]
        if value not in words:
            self._refuse(key, nearest(str(value), list(words)), " or ".join(words))
        return value

    def count(self, key: str) -> int:
        """A whole number above 0."""
        value = self.values[key]
        if type(value) is not int or value < 1:  # a bool is an int, too
            self._refuse(key, "it must be a whole number of at least 1")
        return value

    def heads(self) -> tuple[int, int]:
        """`d_model` and `num_heads`, which part it evenly."""
        width, num_heads = self.count("d_model"), self.count("num_heads")
        if width % num_heads:
            self._refuse("num_heads", f"it must divide d_model, {width}")
        return width, num_heads

    def share(self, key: str) -> float:
        """A number from 0 to below 1, such as a dropout rate."""
        value = self.values[key]
        if type(value) not in (int, float) or not 0 <= value < 1:
            self._refuse(key, "it must be a number from 0 to below 1")
        return float(value)

    def positive(self, key: str) -> float:
        value = self.values[key]
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            self._refuse(key, "it must be a number above 0")
        return float(value)

    def distances(self) -> tuple[int, int]:
        """`num_buckets` and `max_distance` of a relative position bias: half of the buckets hold one distance each."""
        num_buckets, max_distance = self.count("num_buckets"), self.count("max_distance")
        if num_buckets < 4:
            self._refuse("num_buckets", "it must be at least 4")
        if max_distance <= num_buckets // 2:
            self._refuse("max_distance", f"it must be above half of num_buckets, {num_buckets // 2}")
        return num_buckets, max_distance

    def _refuse(self, key: str, why: str, fix: str = "correct the value") -> None:
        raise ConfigError(f"{self.where}.{key}", f"is {self.values[key]!r}", why, fix)
