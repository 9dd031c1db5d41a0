"""Keep cache entries on disk for every process, and survive any damage on disk."""

import json
import os
import subprocess
import sys
import warnings

import pytest

from attnfx import cache
from attnfx.cache import JsonCache, key_of


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNFX_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_what_is_put_is_got_and_cleared():
    cache = JsonCache("answers")
    assert cache.get("a") is None and cache.clear() == 0
    cache.put("a", {"ms": 1.5})
    cache.put("b", [1, "x"])
    cache.put("a", {"ms": 2.5})
    assert cache.entries() == {"b": [1, "x"], "a": {"ms": 2.5}} and list(cache.entries())[-1] == "a"
    assert JsonCache("others").get("a") is None
    assert cache.clear() == 2 and cache.entries() == {} and not cache.path.exists()


def test_what_a_caller_does_to_an_answer_is_not_kept():
    JsonCache("answers").put("a", 1)
    JsonCache("answers").entries().clear()
    assert JsonCache("answers").get("a") == 1


def test_another_process_reads_it():
    JsonCache("answers").put("a", 3)
    code = "from attnfx.cache import JsonCache; print(JsonCache('answers').get('a'))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "3\n"


def test_concurrent_processes_lose_nothing():
    put = 'from attnfx.cache import JsonCache\nfor n in range(20): JsonCache("shared").put(f"{name}-{n}", n)'
    workers = [subprocess.Popen([sys.executable, "-c", f"name = {name!r}\n{put}"]) for name in "abc"]
    assert [w.wait() for w in workers] == [0, 0, 0]
    assert JsonCache("shared").entries() == {f"{name}-{n}": n for name in "abc" for n in range(20)}


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"version": 1}', b'{"entries": 3}', b"\xff\xfe\x00"])
def test_a_damaged_file_is_one_warning_and_made_anew(text):
    cache = JsonCache("answers")
    cache.put("a", 1)
    cache.path.write_bytes(text)
    with pytest.warns(RuntimeWarning, match="cannot be read and is rebuilt") as caught:
        assert cache.get("a") is None and cache.get("a") is None
        cache.put("b", 2)
    assert len(caught) == 1
    assert json.loads(cache.path.read_text())["entries"] == {"b": 2} and cache.get("b") == 2


def test_a_file_of_another_version_counts_as_empty():
    cache = JsonCache("answers")
    cache.put("a", 1)
    cache.path.write_text('{"version": 0, "entries": {"a": 1}}')
    assert cache.get("a") is None


def test_a_directory_that_cannot_be_written_is_one_warning_and_done_without(own_directory):
    own_directory.write_text("a file in the directory's place")
    cache = JsonCache("answers")
    with pytest.warns(RuntimeWarning, match="cannot be written") as caught:
        cache.put("a", 1)
        cache.put("b", 2)
    assert len(caught) == 1
    assert cache.entries() == {"a": 1, "b": 2}  # for this process
    assert cache.clear() == 2 and cache.get("a") is None


def test_what_is_no_json_is_refused_and_changes_nothing():
    cache = JsonCache("answers")
    cache.put("a", 1)
    with pytest.raises(TypeError):
        cache.put("a", object())
    assert cache.get("a") == 1


def test_no_temporary_file_is_left_where_writing_fails(own_directory, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        JsonCache("answers").put("a", 1)
    assert not [name for name in os.listdir(own_directory) if name.endswith(".tmp")]


def test_a_key_is_that_of_its_parts_in_any_order():
    assert key_of(a=1, b=[2]) == key_of(b=[2], a=1) != key_of(a=1, b=[3])


def test_without_a_variable_it_is_the_users_own_directory(monkeypatch):
    monkeypatch.delenv("ATTNFX_CACHE_DIR")
    assert cache.directory().name == "attnfx"
