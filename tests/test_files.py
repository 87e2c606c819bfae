import pytest

from lsnet_d2.errors import UserError
from lsnet_d2.files import make_folder, require_new_file


def test_make_folder(tmp_path):
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot make this folder: File exists"):
        make_folder(tmp_path / "file")
    with pytest.raises(UserError, match="cannot make this folder: Not a directory"):
        make_folder(tmp_path / "file" / "below")


def test_require_new_file(tmp_path):
    path = tmp_path / "file"
    require_new_file(str(path))
    path.touch()
    with pytest.raises(UserError, match="file exists: give --overwrite"):
        require_new_file(str(path))
    require_new_file(str(path), overwrite=True)
    with pytest.raises(UserError, match="is a folder"):
        require_new_file(str(tmp_path), overwrite=True)
    with pytest.raises(UserError, match=r"absent/file: no such folder: .*absent"):
        require_new_file(str(tmp_path / "absent" / "file"))
