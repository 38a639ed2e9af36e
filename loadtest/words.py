"""Common English words, most of them one token in a byte-pair vocabulary: what the prompts are made of."""

from __future__ import annotations

_TEXT = """
able about above act add after again age ago air all also always among animal answer any appear apple area
arm army art ask autumn away baby back bad bag ball band bank bar base bath bear beat beauty bed bell best
better big bird black blood blow blue board boat body bone book born both box boy branch bread break
bridge bright bring brother brown build burn bus busy buy cake call camp car card care carry case cat
catch cause center chair chance change check child choose church circle city class clean clear clock close
cloud coast coat cold color come common cook cool copper corn corner cost cotton could count country
course cover cow create cross crowd cry cup cut dance dark day dead deal dear death deep desert design
desk develop die dinner direct doctor dog dollar door double down draw dream dress drink drive drop dry
dust early earth east easy eat edge egg eight electric else empty end enemy energy engine enter equal even
evening event every exact example expect eye face fact fair fall family famous far farm fast father fear
feed feel few field fight figure fill film final find fine finger finish fire first fish fit five flat
floor flow flower fly follow food foot force forest form forward four free fresh friend front fruit full
game garden gas gate gather general gentle give glad glass go gold good govern grand grass gray great
green ground group grow guess guide gun hair half hand happen happy hard hat head hear heart heat heavy
help here high hill history hit hold hole home hope horse hospital hot hotel hour house how human hundred
hunt ice idea image inch income industry inside iron island job join joy jump just keep key kill kind king
kitchen knife know lady lake land language large last late laugh law lay lead leaf learn least leather
leave left leg length less letter level lie life lift light like line lion list listen little live local
long look lose lot loud love low lunch machine main make man many map mark market mass master match matter
meal mean measure meat meet member memory metal method middle might mile milk million mind minute mirror
miss modern moment money month moon more morning most mother motor mountain mouth move much music must
name nation nature near neck need never new news next night nine noise none north nose note nothing notice
now number object ocean offer office often oil old once one only open opposite orange order other our out
over own page pain paint pair paper parent park part party pass past path pattern pay peace people perfect
period person phone picture piece pilot place plain plan plane planet plant play please poem point poor
port post pound power press pretty price print prize problem produce product proper protect proud public
pull push queen question quick quiet quite race radio rail rain raise range rather reach read ready real
reason record red region remember rest result return rice rich ride right ring rise river road rock roll
roof room root rope rose round row rule run safe sail salt same sand save say scale school science score
sea season seat second secret see seed sell send sense serve seven shall shape share sharp sheep ship
shirt shoe shop short shoulder show side sign silver simple sing sister sit six size skill skin sky sleep
slow small smell smile smoke snow social soft soil soldier some son song soon sort sound south space speak
special speed spell spend spot spring square stand star start state station stay steel step stick still
stone stop store storm story street strong student study such sudden sugar suit summer sun sure surface
surprise sweet swim system table tail take talk tall taste teach team tell ten tent term test than thick
thin thing think third thought three time tiny tire together tone tool top total touch toward town track
trade train travel tree trip truck true trust truth try turn twelve twenty two type uncle under unit until
use usual valley value very village visit voice wait walk wall want war warm wash watch water wave weak
wear weather week weight well west wheel where which while white whole why wide wife wild will wind window
winter wire wish woman wonder wood word work world worth would write year yellow yes yet young zero
"""

WORDS: list[str] = _TEXT.split()
