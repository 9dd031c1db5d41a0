"""Check options: defaults, accepted values, the error message for any other value, and the environment."""

import dataclasses
import pickle
from pathlib import Path

import pytest

from attnfx.errors import AttnfxError, OptionError
from attnfx.options import TIERS, Options


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for field in dataclasses.fields(Options):
        monkeypatch.delenv(f"ATTNFX_{field.name.upper()}", raising=False)


def refused(**given) -> str:
    with pytest.raises(OptionError) as caught:
        Options.make(given)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_the_defaults_are_those_of_the_contract():
    assert dataclasses.asdict(Options.make()) == {
        "rewrite": "cost",
        "target": "auto",
        "tiers": ("flash", "decode", "library", "flex", "chunked", "kept"),
        "memory_budget": None,
        "verify": "off",
        "strict": False,
        "dump_dir": None,
        "inner": "inductor",
        "tune": False,
    }
    assert Options.make({}) == Options.make(None) == Options()


def test_options_are_frozen_hashable_and_picklable():
    options = Options.make({"tiers": ["chunked"], "dump_dir": "stages"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.strict = True  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(options) == hash(Options.make({"tiers": "chunked", "dump_dir": "stages"}))
    assert pickle.loads(pickle.dumps(options)) == options


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rewrite", ["cost", "always", "never"]),
        ("target", ["auto"]),
        ("memory_budget", [None]),
        ("verify", ["off", "first"]),
        ("strict", [False, True]),
        ("inner", ["inductor", "aot_eager", "eager"]),
        ("tune", [False, True, "known", "again"]),
    ],
)
def test_every_valid_value_is_kept_as_it_is(name, values):
    for value in values:
        assert getattr(Options.make({name: value}), name) == value


@pytest.mark.parametrize("tiers", ["library, flash,", ["library", "flash"], {"flash", "library", "kept"}])
def test_tiers_come_as_text_or_iterable_and_kept_is_always_allowed(tiers):
    assert Options.make({"tiers": tiers}).tiers == ("flash", "library", "kept")


def test_only_kept_may_be_allowed():
    assert Options.make({"tiers": "kept"}).tiers == ("kept",)
    assert Options.make({"tiers": iter(TIERS)}).tiers == TIERS


@pytest.mark.parametrize("kind", [str, Path])
def test_dump_dir_becomes_an_absolute_path(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Options.make({"dump_dir": kind("stages")}).dump_dir == tmp_path / "stages"
    assert not (tmp_path / "stages").exists()


def test_option_errors_can_be_caught_as_attnfx_and_as_value_errors():
    assert issubclass(OptionError, AttnfxError) and issubclass(OptionError, ValueError)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("rewritte", "rewrite"), ("Strict", "strict"), ("dumpdir", "dump_dir"), ("memory", "memory_budget"), (1, "inner")],
)
def test_an_unknown_option_names_the_nearest(name, nearest):
    with pytest.raises(OptionError) as caught:
        Options.make({name: "x"})
    assert f"unknown option {name!r}" in str(caught.value)
    if isinstance(name, str):
        assert f"did you mean {nearest!r}? Valid options: " in str(caught.value)


@pytest.mark.parametrize("name", ["max_autotune", "triton.cudagraphs", "epilogue_fusion"])
def test_options_of_inductor_are_refused_and_named_as_such(name):
    sentence = refused(**{name: True})
    assert f"unknown option {name!r}" in sentence
    assert "Inductor's settings belong in torch._inductor.config" in sentence
    assert "did you mean" not in sentence and "; valid options: rewrite, target, " in sentence


def test_an_option_that_resembles_none_gets_no_suggestion():
    assert refused(train=True).startswith("unknown option 'train'; valid options: rewrite, ")


def test_a_cpu_is_named_by_its_tensors_and_not_as_a_target():
    assert refused(target="CPU") == (
        "option 'target': 'CPU' is not a target; for this CPU omit `target` and use CPU tensors"
    )


def test_mode_is_not_an_option():
    assert "mode is an argument of torch.compile" in refused(mode="max-autotune")


def test_options_must_be_a_mapping():
    with pytest.raises(OptionError, match="must be a mapping"):
        Options.make("strict")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("rewrite", "allways", "did you mean 'always'?"),
        ("rewrite", None, "did you mean '"),
        ("target", "atuo", "did you mean 'auto'?"),
        ("target", "h100-sxn", "did you mean 'h100-sxm'?"),
        ("target", object(), "is not a target; give 'auto',"),
        ("tiers", "flash,libary", "did you mean 'library'?"),
        ("tiers", ["flash", 3], "did you mean '"),
        ("tiers", "", "the list of tiers is empty; for no rewrite, give 'kept'"),
        ("memory_budget", "lots", "'lots' is not valid. Valid values: bytes, "),
        ("memory_budget", 0, "0 is not a positive budget. Valid values: bytes, "),
        ("memory_budget", -1, "-1 is not a positive budget. Valid values: bytes, "),
        ("memory_budget", True, "True is not valid. Valid values: bytes, "),
        ("memory_budget", 1.5, "nor a fraction up to 1. Valid values: bytes, "),
        ("memory_budget", float("nan"), "nor a fraction up to 1. Valid values: bytes, "),
        ("verify", "of", "did you mean 'off'?"),
        ("strict", "True", "did you mean True?"),
        ("strict", 0, "did you mean False? Valid values: False, True"),
        ("strict", 1, "did you mean True? Valid values: False, True"),
        ("dump_dir", 3, "3 is not a path; give the path of a folder, or None"),
        ("dump_dir", "", "'' is not a path; give the path of a folder, or None"),
        ("inner", "aot-eager", "did you mean 'aot_eager'?"),
        ("tune", "knwon", "did you mean 'known'?"),
        ("tune", "True", "did you mean True?"),
        ("tune", 0, "did you mean False? Valid values: "),
        ("tune", None, "did you mean '"),
    ],
)
def test_a_bad_value_names_the_option_and_the_nearest_or_every_valid_value(name, value, says):
    sentence = refused(**{name: value})
    assert sentence.startswith(f"option {name!r}: ")
    assert says in sentence


def test_tiers_must_be_a_list():
    assert "is not a list of tiers" in refused(tiers=7)


def test_dump_dir_must_not_be_a_file(tmp_path):
    file = tmp_path / "notes.txt"
    file.touch()
    assert "is a file, not a folder" in refused(dump_dir=file)


@pytest.mark.parametrize(
    ("value", "kept"),
    [(2**34, 2**34), ("16GiB", 2**34), ("1.5 GB", 15 * 10**8), (0.8, 0.8), (1.0, 1.0), ("auto", "auto"), (None, None)],
)
def test_a_budget_is_bytes_a_size_a_fraction_or_what_is_free(value, kept):
    assert Options.make({"memory_budget": value}).memory_budget == kept


def test_the_constructor_checks_as_make_does():
    with pytest.raises(OptionError, match="did you mean 'always'"):
        Options(rewrite="allways")  # pyright: ignore[reportArgumentType]


def test_variables_set_the_defaults(monkeypatch, tmp_path):
    for name, text in {
        "REWRITE": "always",
        "TARGET": "auto",
        "TIERS": "chunked,library",
        "MEMORY_BUDGET": "none",
        "VERIFY": "first",
        "STRICT": "1",
        "DUMP_DIR": str(tmp_path),
        "INNER": "eager",
    }.items():
        monkeypatch.setenv(f"ATTNFX_{name}", text)
    assert Options.make() == Options(
        rewrite="always",
        tiers=("library", "chunked", "kept"),
        verify="first",
        strict=True,
        dump_dir=tmp_path,
        inner="eager",
    )
    assert Options.make({"rewrite": "never"}).rewrite == "never"
    assert Options.make({"rewrite": "never"}).inner == "eager"


@pytest.mark.parametrize("text", ["0", "false", "No", "OFF"])
def test_a_switch_can_be_turned_off_by_its_variable(monkeypatch, text):
    monkeypatch.setenv("ATTNFX_STRICT", text)
    assert Options.make().strict is False


def test_an_empty_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("ATTNFX_REWRITE", "")
    assert Options.make().rewrite == "cost"


@pytest.mark.parametrize(
    ("variable", "text", "says"),
    [
        ("ATTNFX_REWRITE", "allways", "did you mean 'always'?"),
        ("ATTNFX_TIERS", "flush", "did you mean 'flash'?"),
        ("ATTNFX_STRICT", "ture", "did you mean True?"),
        ("ATTNFX_MEMORY_BUDGET", "1.5", "nor a fraction up to 1. Valid values: bytes, "),
        ("ATTNFX_MEMORY_BUDGET", "1e99", "bytes are more than any device has. Valid values: bytes, "),
        ("ATTNFX_VERIFY", "frist", "did you mean 'first'?"),
        ("ATTNFX_INNER", "induktor", "did you mean 'inductor'?"),
    ],
)
def test_a_bad_variable_is_named(monkeypatch, variable, text, says):
    monkeypatch.setenv(variable, text)
    sentence = refused()
    assert sentence.startswith(f"environment variable {variable}: ")
    assert says in sentence


def test_a_given_value_hides_a_bad_variable(monkeypatch):
    monkeypatch.setenv("ATTNFX_REWRITE", "allways")
    assert Options.make({"rewrite": "never"}).rewrite == "never"
