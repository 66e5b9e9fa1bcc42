from randlora_pl.models.weights import ModelIdentity


def test_identities_leave_out_what_is_unknown() -> None:
    assert ModelIdentity("timm", "a", "random", 224, seed=0).as_dict() == {
        "library": "timm",
        "name": "a",
        "pretrained": "random",
        "image_size": 224,
        "seed": 0,
    }
    assert "seed" not in ModelIdentity("timm", "a", "tag", 224).as_dict()
