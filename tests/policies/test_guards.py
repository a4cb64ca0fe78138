import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.facts import MAX_CHARS, facts
from policies.guards import GUARDS, conflict

ANY_TEXT = st.text(st.characters(), max_size=200)  # lone surrogates are among them

REFUSED = [
    ("numbers", "What is 15% of 80?", "What is 18% of 80?"),
    ("numbers", "Can height increase after 21?", "Can height increase after 25?"),
    ("numbers", "He ate two apples of 10", "He ate three apples of 10"),
    ("numbers", "She sold three quarters of them", "She sold two thirds of them"),
    ("numbers", "Cancel order 113542617735902", "Cancel order 732201349959"),
    ("numbers", "phones under 10k", "phones under 15k"),
    ("units", "Is 500 mg too much?", "Is 500 g too much?"),
    ("units", "What is $50 worth?", "What is €50 worth?"),
    ("dates", "What happened in January?", "What happened in February?"),
    ("numbers", "Who won in 1998?", "Who won in 2002?"),
    ("identifiers", "Write to ann@example.com", "Write to bob@example.com"),
    ("identifiers", "What does read_file do?", "What does write_file do?"),
    ("identifiers", "What is the A320neo's range?", "What is the B737max's range?"),
    ("names", "What is the capital of France?", "What is the capital of Germany?"),
    ("names", "Did they visit Peru?", "Did they visit Chile?"),
    ("negation", "Is Spotify available in India?", "Is Spotify not available in India?"),
    ("negation", "Which fish can't I eat?", "Which fish can I eat?"),
    ("opposites", "How do I open a long position?", "How do I open a short position?"),
    ("opposites", "How to enable the firewall?", "How to disable the firewall?"),
    ("opposites", "sort ascending in Python", "sort descending in Python"),
    ("opposites", "trains before noon", "trains after noon"),
    ("opposites", "Is mortgage interest taxable?", "Is mortgage interest deductible?"),
    ("order", "How far is it from Rome to Milan?", "How far is it from Milan to Rome?"),
    ("order", "Is Java better than Rust?", "Is Rust better than Java?"),
    ("aspects", "What are the symptoms of gout?", "What is the outlook of gout?"),
    ("aspects", "What causes asthma?", "Who gets asthma treated?"),
    ("quotes", 'Translate "good night"', 'Translate "good morning"'),
    ("quotes", "What does `git reset` do?", "What does `git revert` do?"),
    ("operators", "what is a + b", "what is a * b"),
    ("repeats", "Pens cost $2, 2 pads cost $5. What is the total?", "Pens cost $3, 2 pads cost $5. What is the total?"),
    (
        "changes",
        "Ann has 5 cats and eats 2 eggs. How many eggs in a week?",
        "Ann has 5 cats and eats 2 eggs. On Sunday she eats another one. How many eggs in a week?",
    ),
]
LEFT_OUT = [
    ("Mark was ill for 3 months and lost 10 pounds a month. He weighs 70 now. What was his weight?", "3.0"),
    ("A team has 105 players, of which 30 defend and 20 do not play. How many attack?", "105.0"),
    ("He paid 2 dollars for 4 pens and 8 dollars for 9 pads. How much was it?", "2.0"),
]
"""A stored sum, and the number that the question leaves out."""
SERVED = [
    ("How do I reset my password?", "How can I change my password?"),
    ("What is the capital of France?", "what's France's capital city?"),
    ("What is the population of India?", "How many people live in India?"),
    ("Who leads the Indian army?", "Who leads the army of India?"),
    ("He has three apples, how many more for 10?", "He has 3 apples, how many more does he need for ten?"),
    ("75% of the 20 students left", "Three-fourths of the 20 students left"),
    ("He ate 2/5 of 60 apples", "He ate 40% of 60 apples"),
    ("He walks 3 times a week", "He walks thrice a week"),
    ("It costs $50,000", "It costs 50000 dollars"),
    ("Can a helicopter fly upside down and why or why not?", "Can a helicopter fly upside down?"),
    ("How do I know whether he blocked me or not?", "How do I know if he blocked me?"),
    ("Is it true that nobody lives there?", "Is it right that nobody is living there?"),
    ("Does Ann like Bob and Carl?", "Does Ann like Carl and Bob?"),
    ("HOW DO I RESET MY PASSWORD", "how do i reset my password"),
    ("Should I see a doctor?", "Should I see Dr. Smith's doctor?"),
    ("She bakes 12 rolls and eats 5. How many are left?", "She bakes a dozen rolls and eats 5. How many are left?"),
    ("He ran 2 times and swam 6 km. How far is that?", "He ran twice and swam 6 km. How far is that?"),
    ("He ate 1 roll and 3 eggs. How many is that in all?", "He ate a roll and 3 eggs. How many is that in all?"),
    ("She ate ⅔ of 30 grapes. How many are left?", "She ate 2/3 of 30 grapes. How many are left?"),
    (
        "If 2 houses cost $76,000 in all, and one costs 30% less, how much is each of the two?",
        "Both houses together are $76,000, and one is 30% less expensive. How much does either of them cost?",
    ),
    (
        "Ann has 5 cats and eats 2 eggs a day. How many eggs in a week?",
        "Ann has 5 cats and eats 2 eggs a day. Her sister buys another dog, which does not change a thing here. "
        "How many eggs in a week?",
    ),
]


@pytest.mark.parametrize(("guard", "one", "other"), REFUSED)
def test_a_guard_refuses_both_ways_round(guard: str, one: str, other: str) -> None:
    for first, second in ((one, other), (other, one)):
        found = conflict(facts(first), facts(second))
        assert found is not None
        assert found.guard == guard


@pytest.mark.parametrize(("stored", "number"), LEFT_OUT)
def test_a_sum_must_give_what_the_stored_answer_rests_on(stored: str, number: str) -> None:
    asked = stored.replace(number.removesuffix(".0"), "some")
    found = conflict(facts(asked), facts(stored))
    assert found is not None
    assert (found.guard, found.first, found.second) == ("givens", "-", number)
    found = conflict(facts(stored), facts(asked))
    assert found is not None
    assert (found.guard, found.first) == ("givens", number)


def test_what_a_sum_adds_may_be_beside_the_point() -> None:
    stored, asked = "Ann has 5 cats and 2 dogs. How many pets?", "Ann has 5 cats and 2 dogs and $9. How many pets?"
    assert conflict(facts(asked), facts(stored)) is None
    assert conflict(facts(stored), facts(asked)) is not None


@pytest.mark.parametrize(("one", "other"), SERVED)
def test_guards_are_silent_about_rephrasings(one: str, other: str) -> None:
    assert conflict(facts(one), facts(other)) is None
    assert conflict(facts(other), facts(one)) is None


def test_a_refusal_says_what_differs() -> None:
    found = conflict(facts("phones under 100 dollars"), facts("phones under 200 dollars"))
    assert str(found) == "numbers: 100.0 / 200.0"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "?!",
        "1" * 5000,
        "9/0",
        "1/2/3",
        "🙂🙃",
        "אבג דהו 12",
        "\ud800",
        "a" * 100_000,
        "x = y ** 2; z < 3",
        "½ ² Ⅷ",
    ],
)
def test_odd_texts_agree_with_themselves(text: str) -> None:
    assert conflict(facts(text), facts(text)) is None


def test_nothing_is_read_beyond_the_bound() -> None:
    assert not facts("x" * MAX_CHARS + " 5").numbers


@given(ANY_TEXT)
def test_no_text_conflicts_with_itself(text: str) -> None:
    assert conflict(facts(text), facts(text)) is None


@given(ANY_TEXT, ANY_TEXT)
def test_a_guard_finds_the_same_from_either_side(one: str, other: str) -> None:
    a, b = facts(one), facts(other)
    for name, guard in GUARDS.items():
        assert name == "givens" or (guard(a, b) is None) == (guard(b, a) is None)
