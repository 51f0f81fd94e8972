"""Starting a compiled kernel through the driver, which a fake stands for."""

import pytest
import torch

from octavo.attention.cuda import nvrtc


class Driver:
    """Answers launches with these, in turn."""

    def __init__(self, *answers):
        self.answers, self.launches = list(answers), []

    def cuLaunchKernel(self, *what):
        self.launches.append(what[1:7])
        return self.answers.pop(0)


@pytest.fixture
def entered(monkeypatch):
    places = []
    monkeypatch.setattr(nvrtc, "_enter", places.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return places


@pytest.mark.parametrize(("answers", "enters"), [((0,), 0), ((nvrtc.NO_CONTEXT, 0), 1)])
def test_a_thread_without_a_context_gets_one(entered, monkeypatch, answers, enters):
    driver = Driver(*answers)
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    nvrtc.Function(None, 128, 3)(7, b"struct", 0)
    assert entered == enters * [torch.device("cuda", 1)]
    assert driver.launches == len(answers) * [(7, 1, 1, 128, 1, 1)]


@pytest.mark.parametrize("answers", [(700,), (nvrtc.NO_CONTEXT, nvrtc.NO_CONTEXT)])
def test_what_the_driver_refuses_is_an_error(entered, monkeypatch, answers):
    driver = Driver(*answers)
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    with pytest.raises(RuntimeError, match=str(answers[-1])):
        nvrtc.Function(None, 128, 3)(7, b"struct", 0)


def test_a_compiler_that_is_not_installed_is_an_error(monkeypatch):
    nvrtc._nvrtc.cache_clear()
    monkeypatch.setattr(nvrtc, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", "999.1")
    with pytest.raises(RuntimeError, match=r"libnvrtc\.so\.999"):
        nvrtc._nvrtc()
    nvrtc._nvrtc.cache_clear()
