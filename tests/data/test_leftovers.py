"""What is left out is counted by kind, and the first few are named in words that can be printed."""

from namr.data import leftovers
from namr.data.leftovers import PassedOver, Tally


def test_kinds_are_counted_and_the_first_few_named() -> None:
    tally, other = Tally(), Tally()
    assert tally.total() == ()
    for number in range(5):
        tally.add(".txt", f"{number}.txt")
    other.add("fifo", "pipe")
    other.add(".txt", "6.txt")
    tally.add_all(other.total())
    assert tally.total() == (
        PassedOver(kind=".txt", num=6, names=("0.txt", "1.txt", "2.txt")),
        PassedOver(kind="fifo", num=1, names=("pipe",)),
    )
    assert [str(each) for each in tally.total()] == ["6 .txt (0.txt, 1.txt, 2.txt, ...)", "1 fifo (pipe)"]


def test_a_name_that_is_no_text_is_told_by_its_bytes() -> None:
    name = b"caf\xe9.jpg".decode(errors="surrogateescape")
    assert leftovers.is_text("café") and not leftovers.is_text(name)
    assert leftovers.printable(name) == "caf\\udce9.jpg"
    tally = Tally()
    tally.add(".jpg", name)
    str(tally.total()[0]).encode()
