"""What is shown while work goes on, where there is no terminal."""

from dinoexport.console import Reporter


def test_remarks_stand_on_lines_of_their_own(capfd) -> None:
    with Reporter().tracker() as track:
        track("data", 0, 0, "note: class 'a' is empty")
        for done in range(1, 101):
            track("features", done, 100, f"{done} pictures/s")
        track("data", 0, 0, "note: class 'a' is empty")
        track("training", 1, 2, "loss 0.5, 812 samples/s")
    lines = capfd.readouterr().err.splitlines()
    assert lines.count("note: class 'a' is empty") == 2
    # A line each tenth, with how fast it goes.
    assert [line for line in lines if line.startswith("features")] == [
        "features 1/100  1 pictures/s",
        *(f"features {done}/100  {done} pictures/s" for done in range(10, 101, 10)),
    ]
    assert lines[-1] == "training 1/2  loss 0.5, 812 samples/s"
