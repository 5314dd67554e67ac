"""Reasons of de-identified copies: why an instance of an archived study has none."""

from __future__ import annotations

from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons.reason import Reason, Scope

_, PERMANENT, OPERATOR = Disposition

DEIDENTIFICATION = (
    Reason(
        "pixels-may-identify",
        OPERATOR,
        Scope.STUDY,
        meaning="The pixels of an instance may show who the patient is.",
        advice="It has no de-identified copy. Look at the image in the identified archive.",
        explanation="""
Ultrasound, fluoroscopy, endoscopy, photographs and everything that was captured from a screen
often have the patient's name burned into the image, which no rule about attributes removes.
CT, MR, PT and NM images pass if they are grey and their Image Type does not say that they are
secondary, a screen, a report or a dose page, and if Burned In Annotation is not YES. What else a
site knows to be clean is named in `projects: NAME: trusted_modalities`.""",
    ),
    Reason(
        "object-cannot-be-cleaned",
        PERMANENT,
        Scope.STUDY,
        meaning="A report, document, presentation state or recording is withheld.",
        advice="It has no de-identified copy; use the identified archive, where that is permitted.",
        explanation="""
Structured reports, encapsulated documents, presentation states and recordings of voices consist
of text and sound that people have made. Table E.1-1 of PS3.15 replaces their whole content by
dummies, which leaves nothing of use, and cleaning text needs a person.""",
        rerun="No: it is withheld again.",
    ),
    Reason(
        "deidentify-unreadable",
        PERMANENT,
        Scope.STUDY,
        meaning="An instance cannot be read from its first byte to its last.",
        advice="It has no de-identified copy. Look at the instance on the PACS.",
        explanation="""
Where an element is longer than what is left, an item does not end, bytes follow the data set, or
the transfer syntax is private, nobody can say which bytes are a name. Validation is lenient with
such instances and archives them as they came; a de-identified copy is not guessed.""",
        rerun="No: it would be withheld again.",
    ),
    Reason(
        "faces-not-removed",
        PERMANENT,
        Scope.STUDY,
        meaning="A face can be rendered from the thin slices of a head.",
        advice="Check that your approval covers images of faces; they are not removed.",
        explanation="""
A CT, MR or PT series of the head with slices of 3 mm or less shows the surface of the face in a
rendering. It passes with this warning. The option *Clean Recognizable Visual Features* (113102)
is never claimed.""",
        rerun="No: it is a remark on a copy.",
    ),
    Reason(
        "project-key-missing",
        OPERATOR,
        Scope.SITE,
        meaning="The key of a de-identification project cannot be read.",
        advice="Provide the key named in the message; it must be the one used before.",
        explanation="""
All replacement values of a project depend on its key: 64 hexadecimal digits, from the environment
variable `PREFECT_DICOM_PROJECT_KEY_NAME` (the project's name in capitals, other characters as
`_`), from the file in `projects: NAME: key_file`, or from a Prefect block in `key_block`. Without
it nothing is de-identified. Another key makes other pseudonyms, so keep a copy of it where you
keep passwords.""",
    ),
)
