"""Known-safe elements: the allow-list behind Table E.1-1.

The table is no closed list: it names no attribute that is newer than it, and few that standard
IODs lack. So text passes only if its attribute is here: attributes of standard IODs that describe
equipment, technique and codes, and that nobody types at a console. Names of people, comments and
labels are not among them, whatever the table says of them.
"""

from __future__ import annotations

import functools

from pydicom.datadict import tag_for_keyword

_TEXTS = """
    Manufacturer ManufacturerModelName ManufacturerRelatedModelGroup SoftwareVersions
    CodeValue LongCodeValue URNCodeValue CodeMeaning CodingSchemeDesignator CodingSchemeVersion
    CodingSchemeRegistry CodingSchemeName CodingSchemeExternalID
    CodingSchemeResponsibleOrganization CodingSchemeURL MappingResourceName
    StageName ViewName EventTimerNames
    PatientSpeciesDescription PatientBreedDescription
    SequenceName PulseSequenceName ImagedNucleus FilterType CollimatorGridName ConvolutionKernel
    ReceiveCoilName TransmitCoilName ReceiveCoilManufacturerName TransmitCoilManufacturerName
    MultiCoilConfiguration MultiCoilElementName PlateType PhosphorType TypeOfFilters GridID
    TriggerSourceOrType CardiacFramingType PVCRejection AcquisitionMode DoseModeName
    AcquisitionDeviceProcessingCode Radiopharmaceutical RadiopharmaceuticalRoute
    ContrastBolusRoute OutputPower TransducerData ProcessingFunction
    DetectorManufacturerName DetectorManufacturerModelName DetectorMode GridAbsorbingMaterial
    GridSpacingMaterial ImageFilter ApplicationName ApplicationVersion ApplicationManufacturer
    SecondaryCaptureDeviceManufacturer SecondaryCaptureDeviceManufacturerModelName
    SecondaryCaptureDeviceSoftwareVersions DigitalImageFormatAcquired VideoImageFormatAcquired
    PaddleDescription ASLCrusherDescription ASLBolusCutoffTechnique
    PositionReferenceIndicator TargetPositionReferenceIndicator StackID
    DimensionDescriptionLabel IOLManufacturer LensStatusDescription
    RescaleType WindowCenterWidthExplanation LUTExplanation ModalityLUTType LUTLabel
    PixelSpacingCalibrationDescription FrameLabelVector DisplayWindowLabelVector
    OpticalPathIdentifier ReferencedOpticalPathIdentifier OpticalPathDescription
    EnergyWindowName AttenuationCorrectionMethod ReconstructionMethod DetectorLinesOfResponseUsed
    ScatterCorrectionMethod ContainerComponentDescription
    SegmentLabel SegmentAlgorithmName TrackingID AlgorithmName AlgorithmVersion AlgorithmSource
    GraphicLayer ImageDisplayFormat
    MIMETypeOfEncapsulatedDocument
    BeamName RadiationMachineName ToleranceTableLabel WedgeID BlockName ApplicatorID
    CompensatorID BolusID MaterialID AccessoryCode PatientSupportID
    RTImageLabel FluenceModeID SourceIsotopeName
"""
TEXTS = frozenset(_TEXTS.split())
"""Keywords of text attributes that are kept, unless ``strict`` is set."""

_BULK = """
    PixelData FloatPixelData DoubleFloatPixelData
    RedPaletteColorLookupTableData GreenPaletteColorLookupTableData
    BluePaletteColorLookupTableData AlphaPaletteColorLookupTableData
    SegmentedRedPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData
    SegmentedBluePaletteColorLookupTableData SegmentedAlphaPaletteColorLookupTableData
    LargeRedPaletteColorLookupTableData LargeGreenPaletteColorLookupTableData
    LargeBluePaletteColorLookupTableData BlendingLookupTableData LUTData
    WaveformData WaveformPaddingValue ChannelMinimumValue ChannelMaximumValue
    SpectroscopyData ICCProfile TrianglePointIndexList EdgePointIndexList VertexPointIndexList
    PrimitivePointIndexList RecommendedDisplayCIELabValueList DarkCurrentCounts AirCounts
"""
BULK = frozenset(_BULK.split())
"""Keywords of attributes of bytes and words that are kept; others may hold whole documents."""

_STRUCTURAL_UIDS = """
    SOPClassUID RelatedGeneralSOPClassUID OriginalSpecializedSOPClassUID SOPClassesInStudy
    ReferencedSOPClassUID SOPClassesSupported CodingSchemeUID ContextGroupExtensionCreatorUID
    ContextUID MappingResourceUID StoredInstanceTransferSyntaxUID AvailableTransferSyntaxUID
    FlowTransferSyntaxUID MACCalculationTransferSyntaxUID EncryptedContentTransferSyntaxUID
    PertinentSOPClassesInStudy PertinentSOPClassesInSeries
"""
STRUCTURAL_UIDS = frozenset(_STRUCTURAL_UIDS.split())
"""Keywords of UIDs of classes, syntaxes, coding schemes and context groups: never replaced."""


@functools.cache
def tags_of(keywords: frozenset[str]) -> frozenset[int]:
    """Tags of keywords; those that the dictionary lacks are left out."""
    return frozenset(tag for each in keywords if (tag := tag_for_keyword(each)) is not None)
