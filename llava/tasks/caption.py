"""Change captions as a task: how their text is normalised, and whether one says that something changed."""

import re

NO_CHANGE_CAPTION = "the scene is the same as before"
"""The no-change sentence of LEVIR-CC that scores best as a constant answer."""


def normalise(text: str) -> str:
    """The text that is scored: lower case, every "." removed, words one space apart; commas stay.

    This is the treatment of the CCExpert release; scores of differently treated text do not compare.
    """
    return " ".join(text.lower().replace(".", "").split())


_CHANGE_VERB = (
    r"(?:appear(?:s|ed|ing)?(?! to\b)|emerg(?:e|es|ed|ing)|show(?:s|n|ed|ing)? up|(?:re)?(?:built|builds)"
    r"|(?:re)?construct(?:s|ed)?|erect(?:s|ed)|add(?:s|ed)|creat(?:es|ed)|formed|pav(?:es|ed)"
    r"|replac(?:e|es|ed|ing)|remov(?:e|es|ed|ing)|disappear(?:s|ed|ing)?|vanish(?:es|ed)?|demolish(?:es|ed)?"
    r"|destroy(?:s|ed)?|damag(?:es|ed)|flood(?:s|ed)|cleared|felled|(?:cut|tor[en]) down|gone|lost"
    r"|turn(?:s|ed)? (?:into|green|brown)|becom(?:e|es|ing)|became|chang(?:e|es|ed|ing)|convert(?:s|ed)"
    r"|transform(?:s|ed)|develop(?:s|ed)|extend(?:s|ed)?|expand(?:s|ed)?|widen(?:s|ed)?|enlarg(?:es|ed)"
    r"|grow(?:s|n)?|grew|increas(?:e|es|ed)|decreas(?:e|es|ed)|reduc(?:es|ed)|shr[aiu]nk(?:s|en)?"
    r"|dr(?:ied|ies up|y up)|planted|dug|cultivated|renovat(?:es|ed)|abandoned|moved|alter(?:s|ed)?"
    r"|modif(?:ies|ied)|differ(?:s|ed)?)"
)
_CHANGE_NOUN = r"(?:chang(?:e|es)|differences?|alterations?|modifications?|variations?|developments?)"
_CHANGE = re.compile(rf"\b(?:{_CHANGE_VERB}|new|newly|no longer|more|fewer|larger|smaller|different)\b")

# "no longer", "not only" and "not the same" introduce changes; "few houses appear" states one.
_NO = (
    r"(?:\b(?:(?:no|not)(?! (?:longer|only|the same|identical|alike|similar))|cannot|never|nothing|none"
    r"|neither|hardly|barely|scarcely|(?<!\ba )(?:few|little)(?= (?:change|difference|has|have)))|n't)"
)
_OPEN_NO = re.compile(rf"{_NO}\b")
# "no obvious change has occurred", "nothing has changed", "i see no difference", "no houses were built"
_NEGATION = re.compile(
    rf"(?:{_NO}(?: [\w'-]+){{0,5}}? (?:{_CHANGE_NOUN}|{_CHANGE_VERB})"
    rf"|nothing(?: \w+)? (?:new|different)|without(?: \w+){{0,3}}? {_CHANGE_NOUN})\b"
    r"(?: (?:that|which|to|can|could|has|have|had|is|are|was|were|be|been))*"
    r"(?: (?:taken|took|take|takes) place"
    r"| (?:chang|occur|happen|observ|seen|found|notic|detect|visible|made|appear|add|remov|buil)\w*)?"
    r"(?: or \w+)?"
)
# "the two scenes seem almost identical", "all roads remain unchanged"; what stands before is only the subject
_SAMENESS = re.compile(
    r"^.*?\b(?:is|are|was|were|be|been|seem(?:s|ed)?|look(?:s|ed)?|appear(?:s|ed)?|remain(?:s|ed)?|stay(?:s|ed)?"
    r"|keep(?:s)?|kept|left)"
    r"(?: (?:to|be|have|all|both|still|almost|nearly|exactly|largely|mostly|basically|essentially|completely"
    r"|very|quite|much|about|just|otherwise|visually|virtually|practically|as|been|stayed|remained))*"
    r" (?:the same|identical|unchanged|unaltered|similar|alike|intact|(?<= as )before)\b"
)
# Too weak against a change word in the same clause: "two identical houses are built".
_HINT = re.compile(r"(?<!\bnot )(?<!\bnot the )\b(?:the same|identical|unchanged|unaltered)\b")
_EXCEPTION = re.compile(r"\b(?:except|apart from|aside from|other than|besides|but)\b")
_CLAUSE_END = re.compile(
    r" *(?:[.;:!?,]+|\b(?:and|while|whereas|although|though|however|yet|with|when|nor)\b)[ ,]*"
)
_DETERMINER = re.compile(
    r"(?:an?|the|some|many|several|two|three|four|five|six|there|lots|most|all|both|it|new)\b"
)


def says_change(text: str) -> bool:
    """Whether a caption states a change; one without a word does not.

    Read clause by clause. A clause that denies change ("nothing has changed", "the roads remain unchanged")
    is set aside. Where nothing is denied the caption is about a change: "a villa with a pool on the left"
    needs no special word. Where something is denied, the rest must name a change ("..., while two houses
    appear") or be an exception ("no change except a small house").
    """
    sentence = " ".join(text.lower().replace("\u2019", "'").split())
    denied = False
    for number, part in enumerate(_EXCEPTION.split(sentence)):
        changed = False
        rests = []
        for clause in _clauses(part):
            rest = _SAMENESS.sub(" ", _NEGATION.sub(" ", clause))
            denying = rest != clause or bool(_HINT.search(clause) and not _CHANGE.search(clause))
            denied = denied or denying
            rests.append("" if denying and not _CHANGE.search(rest) else rest.strip(" '\""))
            changed = changed or bool(_CHANGE.search(rest))
        if changed or (number and denied and any(rests) and not _OPEN_NO.search(part)):
            return True
    return not denied and any(map(str.isalnum, sentence))


def _clauses(part: str) -> list[str]:
    """Cut at punctuation and conjunctions, but keep "no houses, roads or trees appear" whole."""
    clauses: list[str] = []
    for piece in filter(None, _CLAUSE_END.split(part)):
        # A "no" reaches a few words only, so the tail is enough and endless text stays cheap.
        open_no = bool(clauses) and _OPEN_NO.search(_NEGATION.sub(" ", clauses[-1][-200:]))
        if open_no and not _DETERMINER.match(piece):
            clauses[-1] += f" {piece}"
        else:
            clauses.append(piece)
    return clauses
