"""Words that guards and training know by heart."""

from __future__ import annotations

import re
from collections.abc import Mapping

_OPPOSITES = """
ascending descending | increase decrease | increases decreases | increased decreased | increasing decreasing
rise fall | rises falls | rising falling | raise lower | up down | upper lower | higher lower | highest lowest
high low | more less fewer | most least fewest | maximum minimum | max min | maximize minimize
maximise minimise | above below | over under | before after | earlier later | early late | first last
oldest newest | older newer younger | old new | left right | north south | east west | northern southern
eastern western | front back | forward backward | inside outside | indoor outdoor | internal external
import export | imports exports | input output | inner outer | enable disable | enabled disabled
enabling disabling | enables disables | activate deactivate | activated deactivated | activation deactivation
on off | open close | opened closed | opening closing | start stop | started stopped | starting stopping
begin end | lock unlock | locked unlocked | install uninstall | subscribe unsubscribe | mute unmute
block unblock | connect disconnect | attach detach | add remove | adding removing | added removed
insert delete | create delete | creating deleting | upload download | encrypt decrypt | encryption decryption
encode decode | compress decompress | serialize deserialize | push pull | read write | login logout
merge split | grant revoke | allow forbid deny | accept reject decline | approve reject deny | include exclude
including excluding | hide show | show hide | expand collapse | zip unzip | follow unfollow | freeze unfreeze
buy sell | buying selling | bought sold | buyer seller | buyers sellers | purchase sell | long short | call put
calls puts | bull bear | bullish bearish | bulls bears | lend borrow | lending borrowing | lender borrower
deposit withdraw | deposits withdrawals | deposit withdrawal | debit credit | profit loss | profits losses
gain lose | gains losses | gain loss | asset liability | assets liabilities | income expense | revenue cost
taxable deductible | gross net | fixed variable | fixed floating | secured unsecured | traditional roth
market limit | stock bond | stocks bonds | equity debt | inflation deflation | surplus deficit
appreciate depreciate | appreciation depreciation | vested unvested | qualified nonqualified
ordinary qualified | refinance originate | prepay defer | nominal real | hypertension hypotension
hyperthyroidism hypothyroidism | hyperglycemia hypoglycemia | hyperkalemia hypokalemia | benign malignant
acute chronic | positive negative | systolic diastolic | viral bacterial | oral topical | dominant recessive
male female | men women | man woman | boy girl | boys girls | guy girl | guys girls
fully partially | partly wholly | husband wife | father mother | son daughter
brother sister | uncle aunt | pre post | prenatal postnatal | adult child | adults children | win lose
winning losing | won lost | pass fail | passed failed | success failure | succeed fail | love hate
like dislike | like hate | good bad | best worst | better worse | advantage disadvantage
advantages disadvantages | benefit drawback risk | benefits drawbacks risks | pros cons | strength weakness
strengths weaknesses | safe dangerous unsafe | legal illegal | possible impossible | hot cold | hotter colder
warm cool | heat cool | heating cooling | freeze thaw melt | wet dry | big small | bigger smaller
biggest smallest | large small | larger smaller | largest smallest | longer shorter | longest shortest
tall short | taller shorter | tallest shortest | fast slow | faster slower | fastest slowest | heavy light
heavier lighter | strong weak | stronger weaker | easy hard | easy difficult | easier harder | rich poor
cheap expensive | cheapest expensive | thick thin | wide narrow | deep shallow | full empty | clean dirty
public private | free paid | domestic international | local remote | manual automatic | online offline
synchronous asynchronous | static dynamic | mutable immutable | horizontal vertical | odd even | sum difference
add subtract | adding subtracting | multiply divide | plus minus | morning evening | day night | weekday weekend
winter summer | spring autumn | arrive depart leave | arrival departure | arrivals departures | inbound outbound
incoming outgoing | send receive | sending receiving | sent received | sender receiver recipient
mutual index etf | savings checking brokerage | savings money | cash margin | inherited gifted | hedge profit
hedge speculate | ordinary capital | dividends gains interest | income gains | rsus options espp | rsu option
common preferred | adjustable fixed | prime subprime | federal state | joint single | custodial roth
callable convertible | municipal corporate treasury | growth value | domestic foreign | active passive
standard itemized | premium deductible copay | principal interest | term whole universal | 401k ira
american european | covered naked | stop limit market | credit loan
free basic pro premium platinum standard enterprise gold silver freemium | personal business corporate
employer employee | teacher student | parent child | landlord tenant | winner loser | ancestor descendant
predecessor successor | cause prevent | causes prevents | symptoms treatments | cause treatment | gain lose
lose gain | always never | everyone nobody | everything nothing | all none | with without | both neither
agree disagree | true false | correct incorrect | same different | similar different | war peace | birth death
born died | alive dead
""".replace("\n", " | ")


def _words(text: str) -> list[str]:
    return text.split()


def _flips() -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for group in _OPPOSITES.split("|"):
        words = group.split()
        for word in words:
            found.setdefault(word, set()).update(other for other in words if other != word)
    return {word: frozenset(others) for word, others in found.items()}


FLIPS: Mapping[str, frozenset[str]] = _flips()
"""A word -> words that mean the opposite, or another thing in the same place."""

NUMBER_WORDS: Mapping[str, float] = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18,
    "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80,
    "ninety": 90, "hundred": 100, "thousand": 1000, "million": 1e6, "billion": 1e9, "thrice": 3, "decade": 10,
}  # fmt: skip
"""Left out: `one`, which mostly is no number, and `half`, `twice`, `dozen`, which are often written as digits."""

PART_WORDS: Mapping[str, float] = {
    "halve": 1 / 2, "third": 1 / 3, "quarter": 1 / 4, "fourth": 1 / 4, "fifth": 1 / 5, "sixth": 1 / 6,
    "seventh": 1 / 7, "eighth": 1 / 8, "ninth": 1 / 9, "tenth": 1 / 10,
}  # fmt: skip
"""What follows a number word in `two thirds`."""

_SAYS = """
0 no none nothing zero | 0.01 cent cents | 0.1 tenth | 0.2 fifth | 0.25 quarter quarters fourth quarterly
0.333333333 third thirds | 0.5 half halves halve halved equally | 0.666666667 thirds | 0.75 quarters | 0.125 eighth
1 a an one single once each every per full first | 2 two second twice double doubled doubles doubling pair pairs both
couple couples twin twins twofold | 3 third triple tripled triples tripling thrice threefold trio quarter quarterly
equally | 4 fourth quadruple quadrupled quadruples fourfold quarter quarterly | 5 fifth fivefold | 6 sixth sixfold half
7 seventh sevenfold week weekly | 8 eighth eightfold | 9 ninth | 10 tenth tenfold decade decades
12 dozen dozens twelfth year yearly annual annually | 14 fortnight | 15 quarter quarters | 20 twentieth twentyfold score
24 day days daily dozen hours | 30 half thirtieth month | 36 dozen dozens | 48 dozen dozens | 50 half fiftieth
52 year yearly annually | 60 hour hours hourly minute minutes | 100 hundred hundredfold percent century all full
365 year yearly annually | 1000 thousand
""".replace("\n", " | ")


def _says() -> dict[float, frozenset[str]]:
    found: dict[float, set[str]] = {}
    number = 0.0
    for word in _SAYS.replace("|", " ").split():
        if word[0].isdigit():
            number = float(word)
        else:
            found.setdefault(number, set()).add(word)
    return {number: frozenset(words) for number, words in found.items()}


SAYS: Mapping[float, frozenset[str]] = _says()
"""A number -> words that may stand for it in another wording."""

CHANGES = frozenset(
    _words("""
additional extra more another increase increases increased decrease decreases decreased lost fewer less
""")
)
"""Words by which a sentence changes an amount that another one gave."""

VAGUE = frozenset(_words("some several many certain few a an the"))
"""Words that stand where a number could."""

DENIALS = frozenset(_words("despite regardless irrespective ignore ignoring"))
"""Words that say of what stands beside them that it changes nothing."""

TIMES = frozenset(
    _words("""
january february april june july august september october november december monday tuesday wednesday thursday
friday saturday sunday today tomorrow yesterday tonight morning evening noon midnight christmas easter halloween
thanksgiving ramadan diwali
""")
)
"""`March` and `May` are left out: they mostly are no months."""

_UNITS = """
mg milligram milligrams | g gram grams gm | kg kilogram kilograms kilo kilos kgs | lb lbs pound pounds | oz ounce ounces
mcg microgram micrograms µg | ml milliliter milliliters millilitre millilitres | l liter liters litre litres
gallon gallons | mm millimeter millimeters millimetre | cm centimeter centimeters centimetre centimetres
m meter meters metre metres | km kilometer kilometers kilometre kilometres kms | mile miles mi | ft foot feet
inch inches | yard yards | second seconds sec secs s | minute minutes min mins | hour hours hr hrs h | day days
week weeks | month months | year years yr yrs | $ dollar dollars usd bucks | € euro euros eur | £ gbp | ¥ yen
₹ rs rupee rupees inr lakh | % percent pct | kb | mb | gb | tb | px | mph | kmh kph | c celsius °c | f fahrenheit °f
cent cents | dozen dozens | hz | khz | mhz | ghz | w watt watts | kw | kwh | v volt volts
""".replace("\n", " | ")
UNITS: Mapping[str, str] = {
    word: group.split()[0] for group in _UNITS.split("|") if group.split() for word in group.split()
}
"""A unit as written -> its first spelling."""

LOWER_NAMES = frozenset(
    _words("""
i i'm i've i'd i'll is are am the a an my what why how when where who which can could should would do does did
will if it's and or but not in on of to for from with ok please q a.m p.m mr mrs ms dr monday tuesday wednesday
thursday friday saturday sunday rs inr usd usa us uk covid covid-19 coronavirus
""")
)
"""Capitalised, but no names, or names of one thing."""

_ASPECTS = {
    "cause": r"caus(?:e|es|ed|ing)\b|reasons?\b|why\b",
    "symptom": r"symptoms?\b|signs\b",
    "treatment": r"treat(?:s|ed|ment|ments|ing)?\b|cures?\b|therap|remed|get rid\b|what to do for\b",
    "prevention": r"prevent",
    "inheritance": r"inherit|genetic|hereditary",
    "diagnosis": r"diagnos|tested for\b",
    "frequency": r"how many people\b|how common\b|prevalen",
    "outlook": r"outlook\b|prognosis\b|life expectancy\b|complications?\b",
    "who": r"who (?:is|was|are|were|invented|wrote|made)\b",
    "when": r"^when\b|what (?:year|date|day|time)\b",
    "where": r"^where\b",
    "cost": r"how much (?:does|do|is|will) .{1,60}?\b(?:cost|price)|price of\b|cost of\b",
}
ASPECT = re.compile(r"\b(?:" + "|".join(f"(?P<{name}>{pattern})" for name, pattern in _ASPECTS.items()) + ")")
"""What a question asks about its subject, by the name of the group that matches."""

SMALL_WORDS = frozenset(
    _words("""
a an the of in on at to from by for with and or but nor as than that which who whom whose is are was were be
been has have had do does did it its his her their this these those he she they we you i my our your not no can
could will would should may might must also into over under about between after before during through if when
where why how what there then so such both each more most other some any all very just only up down out off
""")
)
"""Words that say how others belong together, and little else."""

TURNING_WORDS = frozenset(
    _words("""
of to in is a was with by on for as his her their from who but an that he she they are were which has had more
been not up than into before after minus over under versus against while because replaced defeated
""")
)
"""Words whose two sides cannot change places without changing what is said. `And`, `or`, `the` are none."""
