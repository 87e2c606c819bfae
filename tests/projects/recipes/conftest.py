import subprocess

import pytest
from recipes_project import FakeTraining


@pytest.fixture
def commands(monkeypatch):
    monkeypatch.setattr(FakeTraining, "commands", [], raising=False)
    monkeypatch.setattr(subprocess, "Popen", FakeTraining)
    return FakeTraining.commands
