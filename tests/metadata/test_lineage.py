"""An older copy of a database is told from the database, however often it is put back."""

from services.metadata.line import Answer, Lineage

IDENTITY = "7300000000000000000-00000001-16384"


class Answers:
    """What a server says when it has synced so much, and what all may compare then."""

    def __init__(self) -> None:
        self.lineage = Lineage()

    def identity_at(self, position: int) -> str | None:
        before = self.lineage.before()
        return self.lineage.named(Answer("18.0", IDENTITY, position), before).identity


def test_a_copy_that_is_put_back_twice_is_another_database_each_time() -> None:
    answers = Answers()
    names = [answers.identity_at(position) for position in (100, 200, 50, 150, 50, 150)]
    assert names[0] == names[1]
    assert names[2] == names[3]
    assert names[4] == names[5]
    assert len({*names}) == 3


def test_a_restart_of_the_service_keeps_the_name_of_a_copy() -> None:
    answers, later = Answers(), Answers()
    answers.identity_at(200)
    name = answers.identity_at(50)
    later.lineage.remember(name, answers.lineage.position)
    assert later.identity_at(60) == name
    assert later.identity_at(50) != name
