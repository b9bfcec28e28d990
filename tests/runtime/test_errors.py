"""Exit codes as DESIGN's section 4 lists them, and sentences for wrong choices."""

from cases import each

from patchssl.runtime import errors


@each(("kind", "code"), [
    ("PatchSSLError", 1), ("UsageError", 2), ("NotFiniteError", 3), ("DataError", 4), ("CheckpointError", 1),
])
def test_exit_codes(kind, code):
    error = getattr(errors, kind)("a sentence")
    assert (error.exit_code, str(error)) == (code, "a sentence")
    assert isinstance(error, errors.PatchSSLError)


def test_an_unreadable_image_is_bad_data_and_keeps_name_and_reason():
    error = errors.UnreadableImage("cat.jpg", "truncated")
    assert isinstance(error, errors.DataError)
    assert (error.name, error.reason, error.exit_code) == ("cat.jpg", "truncated", 4)
    assert "cat.jpg" in str(error)
    assert "truncated" in str(error)


def test_interrupted_tells_signals_apart():
    assert errors.Interrupted("saved").exit_code == 130
    assert errors.Interrupted("saved", 75).exit_code == 75
    assert errors.Interrupted.__mro__[1] is errors.PatchSSLError


def test_one_of_names_the_nearest_and_all():
    sentence = errors.unknown_choice("rule", "centre", ["paper", "center"])
    assert sentence == "rule 'centre' is unknown; did you mean 'center'? Choose one of: center, paper"


def test_one_of_without_a_near_choice_guesses_nothing():
    assert "did you mean" not in errors.unknown_choice("rule", "zzz", ["paper", "center"])
    assert "center, paper" in errors.unknown_choice("rule", "zzz", ["paper", "center"])


def test_one_of_does_not_list_hundreds():
    sentence = errors.unknown_choice("model", "vit_tine", ["vit_tiny", *(f"name{i}" for i in range(300))])
    assert "'vit_tiny'" in sentence
    assert "301 can be chosen" in sentence
    assert len(sentence) < 120
