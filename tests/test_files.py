"""Files and folders are written whole or not at all."""

import pytest

from deltavlm_hf.files import making, placing, replacing, write_bytes, write_text, writing


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "new folder" / "notes.txt"
    write_text(path, "old: Straße\n")
    with pytest.raises(RuntimeError), writing(path) as file:
        file.write("half of the n")
        raise RuntimeError
    assert path.read_bytes() == "old: Straße\n".encode()
    with writing(path) as file:
        file.write("new\n")
        assert path.read_text(encoding="utf-8").startswith("old")
    assert [each.name for each in path.parent.iterdir()] == ["notes.txt"] and path.read_bytes() == b"new\n"
    with pytest.raises(TypeError):
        write_bytes(path, "no bytes")
    assert path.read_bytes() == b"new\n"
    write_bytes(path, b"\x00\r\n")
    assert path.read_bytes() == b"\x00\r\n"


def test_what_a_library_writes_takes_its_place_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "map.gpkg"
    with placing(path) as new:
        assert new.suffix == ".gpkg" and new.parent == path.parent and not new.exists()
        new.write_bytes(b"old")
    with pytest.raises(RuntimeError), placing(path) as new:
        new.write_bytes(b"half of the n")
        raise RuntimeError
    assert path.read_bytes() == b"old" and [each.name for each in path.parent.iterdir()] == ["map.gpkg"]
    new.write_bytes(b"left by a kill")
    with placing(path) as new:
        assert not new.exists()
        new.write_bytes(b"new")
    assert path.read_bytes() == b"new" and [each.name for each in path.parent.iterdir()] == ["map.gpkg"]


def test_a_new_folder_is_not_there_until_it_is_complete(tmp_path):
    folder = tmp_path / "made"
    with pytest.raises(RuntimeError), making(folder) as new:
        write_text(f"{new}/config.json", "{}")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with making(folder) as new:
        write_text(f"{new}/config.json", "{}")
        assert not folder.exists()
    assert [each.name for each in folder.iterdir()] == ["config.json"]


def test_an_empty_folder_is_filled_and_an_old_one_replaced(tmp_path):
    with making(tmp_path) as new:
        write_text(f"{new}/config.json", "1")
    with pytest.raises(RuntimeError), replacing(tmp_path) as new:
        write_text(f"{new}/config.json", "2")
        raise RuntimeError
    assert (tmp_path / "config.json").read_text() == "1"
    with replacing(tmp_path) as new:
        write_text(f"{new}/config.json", "2")
    assert (tmp_path / "config.json").read_text() == "2"
