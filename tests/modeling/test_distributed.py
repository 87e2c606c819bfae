import torch

from lsnet_d2.modeling.distributed import mean_over_workers, workers_apart


def test_one_process_has_its_own_values():
    values = torch.tensor([3.0, 0.0])
    assert torch.equal(mean_over_workers(values), values)


def test_values_are_averaged_over_workers(monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 4)
    others = torch.tensor([1.0, 6.0])
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values: values.add_(others))
    values = torch.tensor([3.0, 0.0])
    assert mean_over_workers(values).tolist() == [1.0, 1.5]
    assert values.tolist() == [3.0, 0.0]
    with workers_apart():
        assert mean_over_workers(values).tolist() == [3.0, 0.0]
    assert mean_over_workers(values).tolist() == [1.0, 1.5]
