"""Files, presets and overrides -> one checked RunConfig, and back. Every problem is reported, in one ConfigError.

A value goes the same way wherever it comes from: its key gets its canonical name, the value is read as the kind that
the key takes, the later source wins (file, then options, then overrides), and the schema checks the whole.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kiem.config import keys as names
from kiem.config.elsewhere import translate
from kiem.config.families import Translation, rope_scaling, window_problem
from kiem.config.formats import Dumper, describe, parse_count, parse_value, read_document
from kiem.config.literals import Unread
from kiem.config.model import ModelConfig, derived
from kiem.config.run import DataConfig, RunConfig
from kiem.errors import ConfigError
from kiem.files import write_atomically

MAX_PROBLEMS = 30  # shown; also unknown keys for which a near one is looked up
MAX_DEPTH = 128
_REMOVE = object()
_KEY = re.compile(r"""(?:^|[{(,\n])[ \t]*["']?([A-Za-z_][\w.-]{0,99})["']?[ \t]*[:=]""")
_OPTIONS = {"data.sources": "--data"}  # options that are not called as their key is


def read_config(
    target: str | Path | Mapping | RunConfig | None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The run configuration of a file, a preset name, a mapping, or (None) of the defaults, with changes on top.

    `options` are values by dotted key (named `--key` in messages), `overrides` are `dotted.key=value` texts; a short
    key will do where it is unambiguous. Raises one ConfigError with every problem found.
    """
    draft = Draft()
    try:
        if isinstance(target, RunConfig):
            draft.add_mapping(config_dict(target), "config")
        elif isinstance(target, Mapping):
            draft.add_mapping(dict(target), "config")
        elif target is not None:
            draft.add_target(str(target))
        for key, value in (options or {}).items():
            draft.set(key, value, _OPTIONS.get(key) or f"--{key.rpartition('.')[2]}")
        for text in sorted(overrides, key=lambda text: not text.startswith("model=")):  # a preset, then changes to it
            draft.override(text)
        return draft.check()
    except ConfigError as error:  # half a surrogate pair in a key or value cannot be printed
        raise ConfigError(str(error).encode("utf-8", "backslashreplace").decode()) from None


def config_dict(config: RunConfig) -> dict[str, Any]:
    """The plain values of a configuration, without those that are still to be derived; read_config gives it back."""
    return config.model_dump(exclude_none=True)


def config_text(config: RunConfig) -> str:
    """The contents of a `config.yaml`."""
    return yaml.dump(config_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def write_config(config: RunConfig, path: str | Path) -> None:
    """Write `config.yaml`, whole or not at all. Raises StorageError."""
    write_atomically(Path(path), config_text(config))


class Draft:
    """A configuration while it is put together: values by section, where each came from, and the problems so far."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {section: {} for section in names.SECTIONS}
        self.origin: dict[str, str] = {}
        self.problems: list[str] = []
        self.meant: set[str] = set()  # keys that a misspelled one meant: their absence is no second problem
        self.base: dict[str, Any] = {}  # the model as a file or preset has it, before changes to single values
        self.changed: set[str] = set()  # the keys of these changes
        self.windows: list[Translation] = []
        self.name = "config"
        self.lines: dict[str, list[int]] = {}

    def add_target(self, target: str) -> None:
        """A preset, or else a file."""
        from kiem.config.presets import PRESETS

        if target in PRESETS:
            self._assign("model", target, target, spoken=False)
            return
        path = Path(target)
        # os.path.exists is False, where Path.exists raises, for a name that no file can have.
        if not os.path.exists(path) and not path.suffix and "/" not in target:
            close = difflib.get_close_matches(target, PRESETS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"presets are {', '.join(PRESETS)}"
            raise ConfigError(f"'{target[:60]}' is neither a file nor a preset: {hint}")
        document = read_document(path)
        self.lines = _lines(document.text)
        self.add_mapping(document.values, target, document.form)

    def add_mapping(self, values: dict[str, Any], name: str, form: str = "") -> None:
        """A model configuration (its top level has model keys), or the sections of a run configuration."""
        self.name = name
        self._add_sections(values, form)
        self.base = dict(self.values["model"])

    def _add_sections(self, values: dict[str, Any], form: str) -> None:
        flat = not any(isinstance(values.get(section), Mapping) for section in names.SECTIONS)
        if flat and (translation := translate(values, form)):
            self._add_translation(translation)
            return
        sections = [key for key in values if key in names.schema()]
        if not sections and any(key in names.model_names() for key in values):
            values = {"model": values}
        for key, value in values.items():
            if key not in names.SECTIONS or not isinstance(value, Mapping):
                self._place("", key, value, self._where(key))
                continue
            self.origin[key] = self._where(key)
            if key == "model" and (translation := translate(value)):
                self._add_translation(translation)
                continue
            for inner, content in value.items():
                self._place(key, inner, content, self._where(inner))

    def _add_translation(self, translation: Translation) -> None:
        """A configuration of another project, in Kiem's keys."""
        for path, (value, key) in translation.values.items():
            if path in names.schema():
                self._assign(path, value, self._where(key), spoken=False)
            else:
                self._unknown(*path.rpartition(".")[::2], self._where(key))
        if translation.problems:
            what = f"{translation.what}: " if translation.what else ""
            self.problems.append(f"{self.name}: {what}{'; '.join(translation.problems)}")
            self.meant.update(f"model.{name}" for name in ModelConfig.model_fields)
        self.windows.append(translation)

    def override(self, text: str) -> None:
        """`key=value`."""
        key, equals, value = text.partition("=")
        key, value = key.strip(), value.strip()
        shown = text if len(text) <= 60 else text[:57] + "..."
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key, re.ASCII):
            self.problems.append(f"'{shown}' is not understood: write key=value, such as train.lr=3e-4 or depth=4")
        elif not value:
            self.problems.append(f"'{shown}' has no value: write {key}=VALUE, or {key}=null for the default")
        else:
            self.set(key, value, f"'{shown}'")

    def set(self, key: str, value: Any, where: str) -> None:
        """A value for a dotted or short key."""
        found = names.find(key)
        if len(found) > 1:
            self.problems.append(f"{where}: {key} is ambiguous: write {' or '.join(found)}")
        elif not found:
            self._unknown(key.rpartition(".")[0], key.rpartition(".")[2], where)
        else:
            self._assign(found[0], value, where, spoken=True)

    def check(self) -> RunConfig:
        """The checked configuration, or one ConfigError with every problem."""
        self._complete_model()
        values = {key: value for key, value in self.values.items() if value != {}}
        config = None
        try:
            config = RunConfig.model_validate(values)
        except ValidationError as error:
            self._explain(error)
        if config is not None:
            self.problems += _without_effect(config)
            context = None if config.model is None else config.model.context_length
            reasons = [reason for window in self.windows if (reason := window_problem(window, context))]
            self.problems += [f"{self.name}: {reason}" for reason in reasons]
        if self.problems or config is None:
            raise ConfigError(_listed(list(dict.fromkeys(self.problems))))
        return config

    def _place(self, section: str, name: Any, value: Any, where: str) -> None:
        """A key of the mapping: canonical name, once, known."""
        path = ".".join(filter(None, (section, names.canonical(section, str(name)))))
        if isinstance(value, Unread):
            self.problems.append(value.problem)
        elif path not in names.schema():
            self._unknown(section, str(name), where)
        elif path in self.origin and path not in names.SECTIONS:
            self.problems.append(f"{where}: {name} is another name for {path}, which is also given: keep one")
        else:
            self._assign(path, value, where, spoken=False)

    def _assign(self, path: str, value: Any, where: str, spoken: bool) -> None:
        key = names.schema()[path]
        self.origin[path] = where
        if spoken:
            self.changed.add(path)
        if isinstance(value, Unread):
            self.problems.append(value.problem)
            self.meant.add(path)
            return
        if path == "model" and isinstance(value, str):
            self._model_preset(value, where)
            return
        if path == "model.rope_scaling" and isinstance(value, Mapping):
            self._rope_scaling(value, where)
            return
        if key.type == "section":
            if isinstance(value, Mapping) and spoken:
                self.values[path] = {}
                for name, content in value.items():
                    self._place(path, name, content, where)
            elif value is not None:
                self.problems.append(
                    f"{where}: {path} is {describe(value)}: it takes a group of keys"
                    + (", or the name of a preset" if path == "model" else "")
                )
            return
        value = _read_spoken(key, value) if spoken and isinstance(value, str) else value
        if key.type == "list":
            value = self._sources(path, value, where)
        elif key.type == "int" and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)  # 1e6
        section, _, name = path.rpartition(".")
        group = self.values[section] if section else self.values
        if value is _REMOVE:
            group.pop(name, None)
        else:
            group[name] = value

    def _model_preset(self, name: str, where: str) -> None:
        from kiem.config.presets import PRESETS

        if name in PRESETS:
            self.values["model"] = PRESETS[name].model_dump(exclude_none=True)
            self.base = dict(self.values["model"])
            return
        close = difflib.get_close_matches(name, PRESETS, n=1)
        self.problems.append(
            f"{where}: model is {describe(name)}, which is not a preset: "
            + (f"did you mean {close[0]}?" if close else f"presets are {', '.join(PRESETS)}")
        )
        self.meant.add("model")

    def _sources(self, path: str, value: Any, where: str) -> Any:
        """Sources as mappings: a text is a path, one source is a list of one."""
        if isinstance(value, str | Mapping):
            value = [value]
        if not isinstance(value, list | tuple):
            return value
        entries = []
        for index, entry in enumerate(value):
            entry = {"path": entry} if isinstance(entry, str) else entry
            entry = entry.model_dump() if hasattr(entry, "model_dump") else entry
            if isinstance(entry, Mapping):
                for name in [name for name in entry if name not in names.source_keys()]:
                    few = len(self.problems) < MAX_PROBLEMS
                    hint = names.nearest_source_key(str(name)) if few else "remove it"
                    self.problems.append(f"{where}: {path}[{index}] has the unknown key '{str(name)[:60]}': {hint}")
                entry = {name: item for name, item in entry.items() if name in names.source_keys()}
            entries.append(entry)
        return entries

    def _unknown(self, section: str, name: str, where: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:  # a file of thousands of them is no configuration
            hint, meant = names.nearest(name, section)
            self.meant.add(meant or "")
            hint = "remove it" if any(problem.endswith(hint) for problem in self.problems) and not meant else hint
        else:
            hint = "remove it"
        self.problems.append(f"{where}: unknown key '{section + '.' if section else ''}{name[:60]}': {hint}")

    def _rope_scaling(self, value: Mapping, where: str) -> None:
        """The group of keys that config.json files have under rope_scaling."""
        scaling, problems = rope_scaling(value)
        self.problems += [f"{where}: rope_scaling: {problem}" for problem in problems]
        self.values["model"] |= scaling
        self.origin |= {f"model.{name}": where for name in scaling}

    def _complete_model(self) -> None:
        """A model is whole in a file or preset, or it is the default family's at a depth; single values change either.

        What followed from a value follows the changed one too.
        """
        model, depth = self.values["model"], self.values.get("depth")
        required = [name for name, field in ModelConfig.model_fields.items() if field.is_required()]
        missing = [name for name in required if name not in model and f"model.{name}" not in self.meant]
        whole = all(name in self.base or f"model.{name}" in self.meant for name in required)
        if depth is not None and (whole or "model" in self.meant):
            self.problems.append(
                f"{self.origin.get('depth', self.name)}: depth and a model that has its own sizes cannot be combined: "
                "keep one (single values can be changed, such as model.context_length=128)"
            )
            self.values.pop("depth")
        elif model and not whole and (depth is not None or not self.base):
            self._on_default_family(model, depth)
        elif model and missing:
            self.problems.append(
                f"{self.origin.get('model', self.name)}: the model section is incomplete, missing "
                f"{', '.join(f'model.{name}' for name in missing)}: give every one, or give depth, from which the rest "
                "follows, or start from a preset with model=gpt2-124m"
            )
        elif self.base:
            for name in ("hidden_dim", "n_kv_heads", "head_dim", "norm_bias", "rope_original_context_length"):
                followed = derived({**self.base, name: None}).get(name)
                if f"model.{name}" not in self.changed and followed is not None and model.get(name) == followed:
                    del model[name]
        if model and any(name not in self.values["model"] for name in required):
            self.meant.update(f"model.{name}" for name in required)

    def _on_default_family(self, model: dict[str, Any], depth: Any) -> None:
        """Values on top of the default family's model. A depth that is wrong stays, for the checks."""
        from kiem.config.presets import DEFAULT_DEPTH, default_values

        depth = DEFAULT_DEPTH if depth is None else depth
        if isinstance(depth, int) and not isinstance(depth, bool) and 1 <= depth <= MAX_DEPTH:
            self.values["model"] = default_values(depth, model)
            self.values.pop("depth", None)
        else:
            self.values["model"] = {}

    def _where(self, key: Any) -> str:
        """file:line of a key where the text has it once, else the file."""
        lines = self.lines.get(str(key), [])
        return f"{self.name}:{lines[0]}" if len(lines) == 1 else self.name

    def _explain(self, error: ValidationError) -> None:
        """Each of the schema's findings in a sentence: where, what was given, what is allowed."""
        for problem in error.errors(include_url=False):
            location = problem["loc"]
            path = ".".join(str(part) for part in location[:2] if isinstance(part, str))
            shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)[1:]
            where = self.origin.get(path) or self.origin.get(path.partition(".")[0]) or self.name
            if problem["type"] == "value_error":
                self.problems += [f"{where}: {text}" for text in str(problem["ctx"]["error"]).split("; ")]
                continue
            if problem["type"] == "missing":
                if path not in self.meant:
                    self.problems.append(f"{where}: {shown} is missing: give it")
                continue
            value = problem["input"]
            self.problems.append(f"{where}: {shown} is {describe(value)}: {_must(location, value)}")


def _must(location: tuple, value: Any) -> str:
    """What a key takes, and how to write the value that was perhaps meant."""
    known = names.schema().get(".".join(str(part) for part in location))
    if known is None and isinstance(location[-1], str):
        known = names.source_keys().get(location[-1])
    if known is None:
        return "a source is a path, or a mapping with path, weight, text_key"
    if known.type == "list":
        return "it takes a list of 1 to 1000 sources, each a path or a mapping with path, weight, text_key"
    hint = ""
    if isinstance(value, str) and known.type in ("int", "float"):
        number = _number_in(value)
        hint = f" (write {number} without quotes)" if number is not None else ""
    elif isinstance(value, str) and known.type == "bool" and value.lower() in ("true", "false"):
        hint = f" (write {value.lower()} without quotes)"
    elif known.allowed.startswith("one of") and isinstance(value, str) and known.path != "device":
        close = difflib.get_close_matches(value.lower(), known.allowed.removeprefix("one of ").split(", "), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
    return f"it takes {known.allowed}{hint}"


def _number_in(text: str) -> int | float | None:
    count = parse_count(text)
    if count is not None:
        return count
    try:
        return float(text)
    except ValueError:
        return None


def _read_spoken(key: names.Key, text: str) -> Any:
    """A value from the command line as the kind that its key takes; what cannot be read stays text, for the checks."""
    if key.optional and text.lower() in ("null", "none"):
        return _REMOVE
    if key.type == "bool":
        return {"true": True, "false": False}.get(text.lower(), text)
    if key.type == "int":
        return count if (count := parse_count(text)) is not None else text
    if key.type == "float":
        return number if (number := _number_in(text)) is not None else text
    return parse_value(text) if key.type == "list" else text


def _without_effect(config: RunConfig) -> list[str]:
    """Keys that were given and can change nothing."""
    data, train, found = config.data, config.train, []
    if data.tokenizer_vocab_size is not None and data.tokenizer != "bpe":
        found.append(
            "data.tokenizer_vocab_size has no effect with a tokenizer other than bpe, which has its own size: "
            "remove it, or set data.tokenizer: bpe"
        )
    default = DataConfig.model_fields["validation_fraction"].default
    if data.validation is not None and data.validation_fraction != default:
        found.append("data.validation_fraction has no effect together with data.validation: remove one")
    if train.cooldown == "none" and train.final_lr_fraction != 0.0:
        found.append("train.final_lr_fraction has no effect with cooldown 'none': remove it, or set cooldown: linear")
    return found


def _lines(text: str) -> dict[str, list[int]]:
    """The lines at which each key stands in a text."""
    found: dict[str, list[int]] = {}
    line, end = 1, 0
    for match in _KEY.finditer(text):
        line += text.count("\n", end, match.start(1))
        end = match.start(1)
        found.setdefault(match[1], []).append(line)
    return found


def _listed(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    shown = problems if len(problems) <= MAX_PROBLEMS else [*problems[: MAX_PROBLEMS - 1], "..."]
    return f"{len(problems)} problems in the configuration\n" + "\n".join(f"  {problem}" for problem in shown)
