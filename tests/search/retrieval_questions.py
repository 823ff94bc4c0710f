"""Questions as people ask them, each with the document and the passage that answers it.

Written by hand against the texts; most avoid the passage's own words, as people do.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """What is asked, and what a hit must hold to answer it; white space of the passage does not count."""

    text: str
    filename: str
    passage: str


_HANDBOOK = "claims-handbook.md"
_POLICY = "homeowners-policy.pdf"
_FAQ = "claims-faq.html"
_NOTE = "inspection-note.txt"

SAMPLE_QUESTIONS = (
    Question(
        "How soon do I have to phone someone who reported a claim?", _HANDBOOK, "within one working day of the report"
    ),
    Question("up to what amount may a senior adjuster settle a property claim", _HANDBOOK, "Senior adjuster"),
    Question("who can deny a claim without a second reader", _HANDBOOK, "May deny a claim"),
    Question("When must the expected cost of a new claim be put on file?", _HANDBOOK, "Set a reserve within 48 hours"),
    Question("stair-stepping", _HANDBOOK, "stair-stepping"),
    Question(
        "formula for depreciation by age and useful life", _HANDBOOK, "subtract depreciation for age over useful life"
    ),
    Question("difference between clean, grey and black water", _HANDBOOK, "black (sewer, flood)"),
    Question("how many bruises in a test square justify a new roof slope", _HANDBOOK, "Eight or more in a square"),
    Question("customer has no receipts for stolen jewellery", _HANDBOOK, "Missing receipts are no reason to deny"),
    Question("warning signs that somebody is cheating", _HANDBOOK, "limit was just raised"),
    Question("getting our money back from the party who caused the loss", _HANDBOOK, "Subrogation means"),
    Question("How long do we have to pay once the amount is agreed?", _HANDBOOK, "Pay after agreement"),
    Question("how to write to a customer that something is not paid", _HANDBOOK, "No Latin"),
    Question("what does the dwelling coverage limit come to", _POLICY, "$412,000"),
    Question("deductible for wind and hail", _POLICY, "2% of Coverage A"),
    Question("when does a house count as vacant", _POLICY, "without enough furniture and working utilities"),
    Question("are my violin and other instruments covered if stolen", _POLICY, "Musical instruments: $3,000"),
    Question("A pipe burst behind the wall, will you pay for opening it up?", _POLICY, "opening walls and floors"),
    Question("pipes froze in an empty house during winter", _POLICY, "a loss by freezing is otherwise not insured"),
    Question("who pays for a hotel and my dog's boarding while the house is repaired", _POLICY, "the boarding of pets"),
    Question("Is earthquake damage insured?", _POLICY, "Earthquake, landslide, sinkhole"),
    Question("a guest fell on our stairs, are the doctor's bills paid", _POLICY, "medical costs of guests"),
    Question("we cannot agree on the amount, what is an umpire", _POLICY, "the two choose an umpire"),
    Question("how much notice before the insurer ends the policy", _POLICY, "30 days' notice if the risk has changed"),
    Question("until when can I sue the insurance company", _POLICY, "within two years of the loss"),
    Question("HF-17", _POLICY, "Endorsement HF-17"),
    Question("photovoltaic system on the roof with battery", _POLICY, "Solar panels fixed to the roof"),
    Question("telephone number to report a claim at night", _FAQ, "555-0142"),
    Question("should I clean up before anybody has come to look", _FAQ, "Stop the damage first"),
    Question("Do I have to use one of your repair shops for my car?", _FAQ, "With a garage of our network"),
    Question("hire car while mine is in the workshop", _FAQ, "$45 a day"),
    Question("at what point is a car a write-off", _FAQ, "75 percent of what the car was worth"),
    Question("how many days until a hail claim is settled", _FAQ, "Hail on the roof"),
    Question("does insurance get more expensive after a claim", _FAQ, "adds 15 percent for three years"),
    Question("IN-77120", _NOTE, "IN-77120"),
    Question("how old is the roof of 27 Millrace Lane", _NOTE, "about 14 years old"),
    Question("moisture readings in the attic", _NOTE, "31 percent on the moisture meter"),
    Question("is the old water heater dangerous", _NOTE, "drain line is not connected"),
    Question("dog or trampoline at the inspected house", _NOTE, "Trampoline in the yard"),
    Question("what should the owner repair at their own expense before it rains", _NOTE, "Repair the chimney flashing"),
)

_CYBER = "policy-cyber-risk.pdf"
_PLAN = "benefits-standard.pdf"
_STAFF = "employee-handbook.pdf"
_PERKS = "perks.pdf"

CORPUS_QUESTIONS = (
    Question("ransom demanded by hackers, what is paid", _CYBER, "Extortion Costs means"),
    Question("attack by a foreign military, is that excluded", _CYBER, "insurrection, rebellion, revolution"),
    Question("what counts as a computer system", _CYBER, "Storage area network"),
    Question("how disputes between insurer and insured are settled out of court", _CYBER, "non-binding mediation"),
    Question("loss of income when a shutdown was voluntary", _CYBER, "voluntary shutdown of your Computer System"),
    Question("employee was tricked into transferring money", _CYBER, "Reverse Social Engineering Attack"),
    Question("may the policy be assigned to somebody else", _CYBER, "Assignment of interest under this Policy"),
    Question("highest amount the insurer is obligated to pay in aggregate", _CYBER, "maximum the Insurer is obligated"),
    Question("fines and penalties by a regulator", _CYBER, "Regulatory Costs means"),
    Question("out-of-pocket maximum for a family", _PLAN, "$12,700 for a family"),
    Question("ambulance ride that was not an emergency", _PLAN, "non-emergency transport"),
    Question("how many hearing aids are covered every three years", _PLAN, "two hearing aids or implants per ear"),
    Question("shoe inserts for foot pain", _PLAN, "custom-made shoe inserts"),
    Question("wage replacement after an injury at work", _PLAN, "Wage replacement"),
    Question("organ donor costs", _PLAN, "cost of the donor organ"),
    Question(
        "tips for choosing in-network screenings and immunizations every year",
        _PLAN,
        "screenings, tests, and immunizations",
    ),
    Question("ear infections and insect bites without an appointment", _PLAN, "ear infections, allergic reactions"),
    Question(
        "am I punished by a penalty if my employer offers no minimum essential coverage",
        _PLAN,
        "minimum essential coverage",
    ),
    Question("keeping my doctor when the plan changes", _PLAN, "ability to stay with the same provider"),
    Question("how often do supervisors review performance", _STAFF, "reviews are conducted annually"),
    Question("zero tolerance for threats and harassment", _STAFF, "zero tolerance policy for workplace violence"),
    Question("protective equipment for workers", _STAFF, "Personal Protective Equipment"),
    Question("what are the company's values, integrity and teamwork", _STAFF, "We value honesty, respect"),
    Question("money back for a gym membership", _PERKS, "Gym memberships"),
    Question("yearly limit for fitness expenses", _PERKS, "up to $1000"),
    Question("surfing and riding lessons", _PERKS, "Horseback riding lessons"),
)

CORPUS_FILES = (
    "policy-cyber-risk.pdf",
    "benefit-options.pdf",
    "benefits-standard.pdf",
    "employee-handbook.pdf",
    "perks.pdf",
    "contract-propane.pdf",
    "federal-register.pdf",
    "handbook.md",
)
