import pytest

from lsnet_d2.errors import ConfigError, UserError, did_you_mean, exit_on_user_error, one_line


def test_user_errors_are_one_line_and_exit_2(capsys):
    @exit_on_user_error(KeyError)
    def main(error):
        raise error

    for error in (ConfigError("a\n b"), KeyError("x")):
        with pytest.raises(SystemExit) as exit_info:
            main(error)
        assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: a b\nerror: 'x'\n"
    with pytest.raises(ZeroDivisionError):
        main(ZeroDivisionError())
    worker = "Caught X in DataLoader worker process 0.\nOriginal Traceback (...):\n  f()\nm.X: a: b"
    assert one_line(UserError(worker)) == "a: b"
    assert did_you_mean("q", ["abc"]) == ""
