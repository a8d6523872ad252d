"""Read the parameters of a recommender and check their values."""

from common.errors import ConfigError, nearest


class Params:
    """The values in `config["<name>"]["model_params"]`. The methods check them.

    Every method raises ConfigError if the value is wrong.
    """

    def __init__(self, config: dict, name: str):
        self.values, self.where = config[name]["model_params"], f"{name}.model_params"

    def choice(self, key: str, *words: str) -> str:
        """Return the value of `key`. It must be one of `words`."""
        value = self.values[key]
        if value not in words:
            raise ConfigError(f"{self.where}.{key}", f"unknown value {value!r}", nearest(str(value), list(words)),
                              "use " + " or ".join(words))
        return value

    def count(self, key: str) -> int:
        """Return the value of `key`. It must be an integer of at least 1."""
        value = self.values[key]
        if type(value) is not int or value < 1:  # bool is a subclass of int
            self._refuse(key, "an integer of at least 1")
        return value

    def heads(self) -> tuple[int, int]:
        """Return `d_model` and `num_heads`. `d_model` must be a multiple of `num_heads`."""
        width, num_heads = self.count("d_model"), self.count("num_heads")
        if width % num_heads:
            self._refuse("num_heads", f"a divisor of d_model ({width})")
        return width, num_heads

    def share(self, key: str) -> float:
        """Return the value of `key`, for example a dropout rate. It must be at least 0 and less than 1."""
        value = self.values[key]
        if type(value) not in (int, float) or not 0 <= value < 1:
            self._refuse(key, "a number >= 0 and < 1")
        return float(value)

    def positive(self, key: str) -> float:
        """Return the value of `key`. It must be a finite number above 0."""
        value = self.values[key]
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            self._refuse(key, "a number above 0")
        return float(value)

    def number_or_auto(self, key: str, kind: type) -> float | None:
        """Return the value of `key` as an int or a float (`kind`), or None if the value is `auto`."""
        value = self.values[key]
        if value == "auto":
            return None
        if type(value) not in ((int,) if kind is int else (int, float)):
            self._refuse(key, "auto or " + ("an integer" if kind is int else "a number"))
        return kind(value)

    def distances(self) -> tuple[int, int]:
        """Return `num_buckets` and `max_distance` of a relative position bias.

        `num_buckets` must be at least 4. `max_distance` must be greater than `num_buckets / 2`.
        """
        num_buckets, max_distance = self.count("num_buckets"), self.count("max_distance")
        if num_buckets < 4:
            self._refuse("num_buckets", "at least 4")
        if max_distance <= num_buckets // 2:  # the first half of the buckets contains one distance each
            self._refuse("max_distance", f"greater than half of num_buckets ({num_buckets // 2})")
        return num_buckets, max_distance

    def _refuse(self, key: str, required: str) -> None:
        raise ConfigError(f"{self.where}.{key}", f"must be {required}, got {self.values[key]!r}",
                          fix="correct the value")
