"""How long an answer stays true: relative times, jitter, what may be served stale, what is worth keeping."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np


class Horizon(IntEnum):
    """How soon the answer to a question changes by itself, soonest last."""

    NONE = 0
    YEAR = 1
    """This year, recently."""
    WEEK = 2
    DAY = 3
    """Today, tomorrow, tonight."""
    NOW = 4
    """A price, a score, the weather, the time; latest, current, live."""


@dataclass(frozen=True, slots=True)
class FreshnessRules:
    """Seconds that an answer may live at most, by horizon; 0 forbids storing it."""

    year: float = 7 * 86400.0
    week: float = 6 * 3600.0
    day: float = 900.0
    now: float = 0.0

    def ttl(self, ttl: float, horizon: Horizon) -> float:
        """Shorten a category's TTL to what the horizon allows; never lengthens it."""
        match horizon:
            case Horizon.NONE:
                return ttl
            case Horizon.YEAR:
                return min(ttl, self.year)
            case Horizon.WEEK:
                return min(ttl, self.week)
            case Horizon.DAY:
                return min(ttl, self.day)
            case Horizon.NOW:
                return min(ttl, self.now)


def horizon(text: str) -> Horizon:
    """The soonest horizon that a question's words speak of. Of a long text the beginning and the end are read.

    A story with numbers of its own (a word problem) has a "now" of its own, and asks nothing about the world's.
    """
    text = (text if len(text) <= 2 * _READ else f"{text[:_READ]}\n{text[-_READ:]}").lower().replace("’", "'")
    words = _WORD.findall(text)
    if len(words) > _STORY_WORDS:
        if len(_NUMBER.findall(text)) >= _STORY_NUMBERS:
            return Horizon.NONE
        text = " ".join(_SENTENCE.split(text.strip())[-_ASKING:])
        words = _WORD.findall(text)
    soonest = max((_WORDS[word] for word in words if word in _WORDS), default=Horizon.NONE)
    for word in words:
        for level, phrase in _PHRASES.get(word, ()):
            if level > soonest and phrase.search(text):
                soonest = level
    if not text.isascii():
        soonest = max((level for sign, level in _SIGNS.items() if level > soonest and sign in text), default=soonest)
    return soonest


_READ = 1000
"""Characters of each end of a long text."""
_STORY_WORDS = 25
_STORY_NUMBERS = 3
_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_ASKING = 2
"""Sentences at the end of a long text that are taken for its question."""
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def _by_word(**levels: str) -> dict[str, Horizon]:
    return {word: Horizon[level] for level, words in levels.items() for word in words.split()}


_WORDS = _by_word(
    NOW="news headlines weather forecast standings jetzt aktuell aktuelle aktueller aktuelles derzeit "
    "momentan wetter nachrichten börsenkurs aktienkurs wechselkurs maintenant actuellement météo ahora actualmente "
    "cotización adesso attualmente meteo agora atualmente сейчас погода новости",
    DAY="today today's tonight tonight's tomorrow tomorrow's yesterday heute gestern aujourd'hui demain hier hoy "
    "mañana ayer oggi domani ieri stasera hoje amanhã ontem сегодня завтра вчера",
    WEEK="nowadays upcoming",
    YEAR="recent recently lately trending newest latest kürzlich neulich récemment recientemente recentemente недавно",
)
"""Words that say it alone."""

_MONEY = "(?:usd|eur|gbp|jpy|inr|dollars?|euros?|pounds?|yen|rupees?)"
_PERIOD = "(?:week(?:end)?|month|monday|tuesday|wednesday|thursday|friday|saturday|sunday)"
_PHRASES: dict[str, list[tuple[Horizon, re.Pattern[str]]]] = {}
"""Phrases by the word whose presence makes them worth looking for."""


def _phrases(level: Horizon, phrases: dict[str, str]) -> None:
    for words, phrase in phrases.items():
        for word in words.split():
            _PHRASES.setdefault(word, []).append((level, re.compile(rf"\b(?:{phrase})\b")))


_phrases(
    Horizon.NOW,
    {
        "now": r"right now|as of now|just now|(?:is|are|open|online|up|available|happening|playing) now|now(?=\W*$)",
        "currently": r"(?<!i am )(?<!i'm )currently(?! (?:i|i'm|am|working|using|taking|studying|living)\b)",
        "moment present": r"at the moment|at present|en (?:ce|este) mom\w+|in questo momento|im moment",
        "far": r"so far(?! (?:away|from|as|that))",
        "current": (
            r"current (?!affairs|of|in|flow|through|density|sensor|account|source|total|number|count|age"
            r"|password|job)\w+"
        ),
        "latest newest recent": r"(?:latest|newest|most recent) \w+",
        "live breaking": r"(?:live|breaking) (?:score|stream|coverage|news|update|result|stat\w*|price|data|traffic)s?",
        "real realtime date": r"real-? ?time (?:data|price|rate|info\w*|update|score)s?|up-to-date",
        "time": r"what time is it|what(?:'s| is) the (?:current )?time(?: now| in \w+)?(?=\W*$)|the time now",
        "date day": r"what(?:'s| is) the date(?: today)?(?=\W*$)|what (?:day|date) is it",
        "temperature": r"(?:what|how) .{0,20}temperature (?:in|at|outside)",
        "rain raining snow snowing": r"(?:is|will) it (?:be )?(?:rain|snow)\w*",
        "traffic": r"traffic (?:on|in|near)",
        "score": r"(?:the|current|final|live) score (?:of|in|between) the",
        "winning won": r"who(?:'s| is) winning|who won (?:the )?(?:game|match|election|race)",
        "price prices quote quotes": (
            r"(?:stock|share|bitcoin|btc|eth\w*|crypto\w*|gold|silver|oil|gas|fuel|petrol|market|spot|ticket|flight) "
            r"(?:price|quote)s?|(?:what|how)(?:'s| is| are| much is| much are).{0,20} prices? of"
        ),
        "rate rates": r"(?:exchange|interest|mortgage|inflation|conversion) rates?",
        "worth trading": r"how much (?:is|are) .{1,40} (?:worth|trading)",
        "usd eur gbp jpy inr dollars dollar euros euro pounds yen rupees": rf"{_MONEY} (?:in)?to {_MONEY}",
        "spät": r"wie spät",
        "heure nouvelles infos change cours": (
            r"quelle heure|dernières? (?:nouvelles|infos?)|taux de change|cours de l'action"
        ),
        "hora noticias tiempo cambio": r"qué hora|últimas? noticias|el tiempo en|tipo de cambio",
        "ore notizie horas previsão": r"che ore|ultime notizie|que horas|previsão do tempo",
        "час курс": r"который час|курс (?:доллара|евро|рубля)",
    },
)
_phrases(
    Horizon.DAY,
    {
        "this": r"this (?:morning|afternoon|evening|hour)",
        "hours hour": r"in the (?:last|past|next) (?:\d+ )?hours?",
        "morgen": r"morgen (?:früh|mittag|abend)",
        "soir noche": r"ce soir|esta noche",
    },
)
_phrases(
    Horizon.WEEK,
    {
        "this next last past coming": rf"(?:this|next|last|past|coming) {_PERIOD}",
        "these days weeks": r"these days|in the (?:last|past|next) (?:few |\d+ )?(?:days?|weeks?)",
        "woche monat wochenende": r"(?:diese|nächste|letzte|vergangene)[nrs]? (?:woche|monat|wochenende)",
        "semaine mois semana mes": r"cette semaine|ce mois|la semaine \w+|(?:esta|próxima) semana|este m[eê]s",
        "settimana mese": r"questa settimana|questo mese",
        "неделе месяце": r"на этой неделе|в этом месяце",
    },
)
_phrases(
    Horizon.YEAR,
    {
        "year season quarter": r"(?:this|next|last) (?:year|season|quarter)",
        "jahr année año anno ano": r"dieses jahr|cette année|est[ea] a[ñn]o|quest'anno",
        "году": r"в этом году",
    },
)

_SIGNS = {
    sign: level
    for level, signs in {
        Horizon.NOW: "现在 目前 最新 当前 天气 新闻 股价 汇率 几点 今の 現在 天気 ニュース 株価 為替 何時 "
        "지금 현재 날씨 뉴스 주가 환율",
        Horizon.DAY: "今天 今日 今晚 明天 昨天 今夜 明日 昨日 오늘 내일 어제",
        Horizon.WEEK: "本周 这周 这个月 今週 今月 이번",
        Horizon.YEAR: "今年 最近 올해 최근",
    }.items()
    for sign in signs.split()
}
"""Scripts without spaces between words."""


def jittered(ttl: float, share: float, draw: float) -> float:
    """A TTL shortened by up to `share` of itself, so that what was stored together does not expire together.

    `draw` is uniform in [0, 1). Never longer than what was allowed.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"a jitter is a share from 0 to below 1, not {share}")
    return ttl * (1.0 - share * draw)


class Serving(StrEnum):
    """What a stored answer is good for at some age."""

    FRESH = "fresh"
    REVALIDATE = "stale-while-revalidate"
    """Serve it, and ask the backend anew in the background."""
    ON_ERROR = "stale-if-error"
    """Ask the backend; serve this if it fails."""
    EXPIRED = "expired"


def serving(now: float, expires: float, *, while_revalidate: float, if_error: float) -> Serving:
    """Say what an answer that expires at `expires` is good for (RFC 5861); the others are seconds after its expiry."""
    late = now - expires
    if late < 0:
        return Serving.FRESH
    if late < while_revalidate:
        return Serving.REVALIDATE
    return Serving.ON_ERROR if late < if_error else Serving.EXPIRED


_ROWS = 4


class Sightings:
    """How often keys were missed, about: a count-min sketch of bytes that ages (TinyLFU, arXiv 1512.00727, section 3).

    Never counts too few since the last ageing; after every `window` misses all counts are halved, so that what was
    asked long ago counts less and less. `4 * width` bytes, whatever the traffic.
    """

    def __init__(self, width: int = 1 << 14, window: int = 1 << 16) -> None:
        if width < 1 or window < 1:
            raise ValueError("width and window must be positive")
        self._counts = np.zeros((_ROWS, width), np.uint8)
        self._window = window
        self._since = 0

    def missed(self, key: bytes) -> int:
        """Count one miss of a 16-byte digest; return how often it was missed, this time included (at most 255)."""
        places = self._places(key)
        counts = [int(self._counts[row, place]) for row, place in enumerate(places)]
        least = min(counts)
        if least < 255:
            # Raising only the smallest counters keeps the others from being too high by more than they must.
            for row, place in enumerate(places):
                if counts[row] == least:
                    self._counts[row, place] = least + 1
        self._since += 1
        if self._since >= self._window:
            self._counts >>= 1
            self._since = 0
        return min(255, least + 1)

    def seen(self, key: bytes) -> int:
        """How often a 16-byte digest was missed, about."""
        return min(int(self._counts[row, place]) for row, place in enumerate(self._places(key)))

    def _places(self, key: bytes) -> list[int]:
        if len(key) != 4 * _ROWS:
            raise ValueError(f"a key has {4 * _ROWS} bytes, not {len(key)}")
        width = self._counts.shape[1]
        # The key is a digest already: each quarter of it is as good as a hash of its own.
        return [int.from_bytes(key[4 * row : 4 * row + 4], "little") % width for row in range(_ROWS)]


def worth_keeping(missed: int, admit_after: int) -> bool:
    """Whether an answer is stored at its `missed`-th miss; `admit_after` 1 stores at the first."""
    return missed >= admit_after
